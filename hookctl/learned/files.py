"""Files of weights, read without running anything that is in them.

What a file is, is seen in its first bytes, not in its name. Safetensors are read as such, what
`torch.save` wrote with `weights_only=True`, and where that refuses (a configuration is in the file
too) by `pickles.Reader`. Tensors stay in the file until they are used.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hookctl.errors import InputError
from hookctl.learned.reading.located import ENDINGS
from hookctl.learned.reading.pickles import HostileError, Reader

_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[2:]  # torch before 1.6, without PROTO
_HEADER = 100 * 2**20  # bytes of the header of a safetensors file, at most
_DEPTH = 32  # tables within tables
_NAME = 2000  # letters
_LARGEST = 32 * 2**30  # bytes of all tensors, of a file that is smaller
_COUNT = 200_000  # tables and tensors in all
_KINDS = "a safetensors file or one of torch.save (.pth, .pt, .bin, .ckpt)"
# How files are known that are none, and what they are.
_OTHERS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself; run git lfs pull"),
    (b"<!doctype html", "is a web page, not the file that it offers; download that"),
    (b"<html", "is a web page, not the file that it offers; download that"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it"),
    (b"Rar!", "is a RAR archive; unpack it"),
    (b"GGUF", f"is a GGUF file; give {_KINDS}"),
)
# The one that is meant where a folder holds several.
_PREFERRED = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
# The files that ComfyUI splits InstanceDiffusion into.
_SPLIT = frozenset(("position_net", "fusers", "scaleu"))


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their names, tables within tables joined by dots, and where they come from.

    notes: what was chosen, left out or not read, a line each.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}

    def noting(self, *notes: str, tensors: Mapping[str, Tensor] | None = None) -> Checkpoint:
        """The same with further notes, and of other tensors."""
        kept = self.tensors if tensors is None else tensors
        return replace(self, tensors=kept, notes=(*self.notes, *notes))


def read(path: Path | str) -> Checkpoint:
    """The tensors of a file, or of the one file of weights in a folder; or of all three in one
    that holds an InstanceDiffusion in ComfyUI's parts.

    Raises InputError for a file that can't be read, is cut off or wants code to be run;
    FileNotFoundError if there is none.
    """
    path = Path(path).expanduser()
    parts = _weights_in(path) if path.is_dir() else []
    if {one.stem for one in parts} == _SPLIT and len(parts) == len(_SPLIT):
        tensors = {key: t for one in parts for key, t in read(one).tensors.items()}
        return Checkpoint(path, tensors, (f"of {', '.join(one.name for one in parts)}",))
    path = _file(path, parts)
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] == b"PK\x03\x04":
        _check_archive(path)
        return _pickled(path, mapped=True)
    if head[2 : 2 + len(_LEGACY)] == _LEGACY:
        return _pickled(path, mapped=False)
    if head[8:9] == b"{":
        return _safetensors(path, int.from_bytes(head[:8], "little"))
    raise InputError(f"{path}: {_no_weights(head)}")


# -- which file ------------------------------------------------------------------------------------


def _weights_in(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.suffix in ENDINGS)


def _file(path: Path, held: list[Path]) -> Path:
    """The file itself, or the one that is meant of those held by a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such file; give {_KINDS}")
    named = [path / name for name in _PREFERRED if path / name in held]
    if len(held) == 1 or named:
        return (named or held)[0]
    if not held:
        raise InputError(f"{path}: holds no file of weights; give {_KINDS}")
    names = ", ".join(one.name for one in held[:8])
    raise InputError(f"{path}: holds {len(held)} files of weights ({names}); give one of them")


def _no_weights(head: bytes) -> str:
    if not head.strip(b"\0"):
        return "is empty; download it again" if not head else "holds zeros; download it again"
    start = head.lstrip().lower()
    for known, what in _OTHERS:
        if start.startswith(known.lower()):
            return what
    if head[:1] == b"\x80" or head[:1] in b"(c]}":
        return f"is a pickle, but none of torch.save, and is not read; give {_KINDS}"
    return f"is no file of weights; give {_KINDS}"


# -- safetensors -----------------------------------------------------------------------------------


def _safetensors(path: Path, length: int) -> Checkpoint:
    size = path.stat().st_size
    if not 2 <= length <= min(_HEADER, size - 8):
        raise InputError(
            f"{path}: can't be read as safetensors (its header is said to have {length} bytes, the "
            f"file has {size}); download it again"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:  # as many kinds as there can be nonsense in a header
        raise _unreadable(path, "safetensors", error) from None
    return _checked(Checkpoint(path, tensors))


# -- torch.save ------------------------------------------------------------------------------------


def _check_archive(path: Path) -> None:
    """InputError unless a zip file is one of torch.save, whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError):
        raise InputError(
            f"{path}: is cut off or damaged (the index at its end can't be read); download it again"
        ) from None
    names = [member.filename for member in members]
    if any(name.endswith("constants.pkl") for name in names):
        raise InputError(
            f"{path}: is a TorchScript program, which is not run; give its weights, saved by "
            "torch.save(module.state_dict())"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        held = ", ".join(names[:5]) or "nothing"
        raise InputError(f"{path}: is an archive ({held}); unpack it and give {_KINDS}")
    packed = next((m.filename for m in members if m.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise InputError(f"{path}: {packed!r} in it is compressed, which torch.save never does")


def _pickled(path: Path, mapped: bool) -> Checkpoint:
    """mapped: tensors stay in the file."""
    notes: tuple[str, ...] = ()
    # By a name of another ending, torch takes a file for another.
    mapped = mapped and path.suffix != ".safetensors"
    options: dict[str, Any] = {"map_location": "cpu", "mmap": mapped}
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")
        source = str(path) if mapped else file
        try:
            found = torch.load(source, weights_only=True, **options)
        except Exception:  # also of files that are whole: they hold more than weights
            reader = Reader()
            file.seek(0)
            try:
                found = torch.load(source, pickle_module=reader, weights_only=False, **options)
            except HostileError as error:
                raise InputError(
                    f"{path}: would call {str(error)!r} when it is read. Weights never do: it is "
                    "an attack or the like, and nothing of it was run"
                ) from None
            except Exception as error:
                raise _unreadable(path, "a file of torch.save", error) from None
            notes = _skipped(reader)
    return _checked(Checkpoint(path, _flat(path, found), notes))


def _skipped(reader: Reader) -> tuple[str, ...]:
    if not reader.skipped:
        return ()
    shown = ", ".join(repr(name)[1:-1][:80] for name in sorted(reader.skipped)[:6])
    more = ", ..." if len(reader.skipped) > 6 else ""
    return (f"not loaded, since they are no weights: objects of {shown}{more}",)


def _flat(path: Path, found: Any) -> dict[str, Tensor]:
    """The tensors in tables within tables, by joined names."""
    tensors: dict[str, Tensor] = {}
    seen = 0

    def gather(found: Any, name: str, depth: int) -> None:
        nonlocal seen
        seen += 1  # a table may be held by itself, or a hundred times at each level
        if depth > _DEPTH or seen > _COUNT or len(name) > _NAME:
            raise InputError(f"{path}: its tables are nested too deeply to be those of weights")
        if isinstance(found, Tensor):
            if name in tensors:
                raise InputError(f"{path}: holds {name!r} twice")
            if found.layout is torch.strided and not found.is_quantized:
                tensors[name or "tensor"] = found.detach()
            return
        for key, value in found.items() if isinstance(found, Mapping) else enumerate(found):
            if isinstance(value, Tensor | Mapping | list | tuple):
                part = str(key) if isinstance(key, str | int) else type(key).__name__
                gather(value, f"{name}.{part}" if name else part, depth + 1)

    if isinstance(found, Tensor | Mapping | list | tuple):
        gather(found, "", 0)
    return tensors


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """A file that was read, whose names can be printed and whose tensors can be held."""
    path, tensors = checkpoint.path, checkpoint.tensors
    if not tensors:
        more = "".join(f" ({note})" for note in checkpoint.notes)
        raise InputError(f"{path}: holds no tensors{more}; give {_KINDS}")
    odd = next((key for key in tensors if len(key) > _NAME or not key.isprintable()), None)
    if odd is not None:
        raise InputError(f"{path}: holds a tensor named {odd[:40]!r}, which is no name of a weight")
    # Strides of 0 let a small file hold tensors of any size.
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if size > max(_LARGEST, 2 * path.stat().st_size):
        raise InputError(
            f"{path}: its tensors take {size / 2**30:,.0f} GiB, and the file has "
            f"{path.stat().st_size / 2**20:,.1f} MiB; that is no file of weights"
        )
    return checkpoint


def _unreadable(path: Path, what: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"{path}: can't be read as {what}; it may be cut off or damaged, so download it again "
        f"({reason[:200]})"
    )
