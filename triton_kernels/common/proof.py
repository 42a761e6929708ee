"""A kernel proves itself where it runs: its first launch in each form is held against torch's own.

No test can try every chip, driver and compiler that there is. So before a form's result is used on
a device, it is compared with what plain torch gives for that very call, gradients included.
Agreement is remembered in the user's cache folder; after disagreement, or any error of the compiler
or the launch, plain torch serves for the rest of the process, and one warning says what to report.

    $HOOKCTL_CACHE, or $XDG_CACHE_HOME/hookctl, or ~/.cache/hookctl
        kernels/<chip, driver, torch, triton and the kernels' own source as a hash>.json
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

T = TypeVar("T")

# Relative, of the norm, between a kernel and torch's own in the same precision; a single element
# may be further off by `_FURTHER`, against the largest, and a gradient too.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FURTHER = 8

# Whether kernels in the interpreter, which only tests use, have to prove themselves too.
interpreted_too = False

_lock = threading.RLock()
_known: dict[tuple[str, str], str | None] = {}  # (place, form) -> why it is refused, None if proved
_read: set[str] = set()
_warned = False


def served(
    form: str,
    like: Tensor,
    kernel: Callable[[], T],
    reference: Callable[[], T],
    flat: Callable[[T], Tensor],
    *,
    learned: Sequence[Tensor] = (),
    demanded: bool = False,
) -> T:
    """What a kernel gives, or its reference where the kernel fails or is wrong on this device.

    form: what is compiled apart, in words; like: one of its tensors; flat: of a result, one tensor
    to compare; learned: tensors whose gradients are compared too.
    demanded: raise RuntimeError in place of falling back.
    """
    if _exempt(like):
        return kernel()
    place = place_of(like.device)
    with _lock:
        _remember(place)
        known = (place, form) in _known
        refused = _known.get((place, form))
    if refused and not demanded:
        return reference()
    try:
        found = kernel()
        if not known or refused:
            wrong = _difference(found, reference(), flat, learned)
            if wrong:
                raise ArithmeticError(wrong)
            _agreed(place, form)
        return found
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, the launch, the driver, or the comparison
        said = " ".join(str(error).split())[:300]
        why = said if isinstance(error, ArithmeticError) else f"{type(error).__name__}: {said}"
        if demanded:
            raise RuntimeError(f"the kernel for {form} failed on {place}: {why}") from error
        _refuse(place, form, why)
        return reference()


def refused(form: str, like: Tensor) -> str | None:
    """Why a form is not used on a device; None if it may be."""
    return None if _exempt(like) else _known.get((place_of(like.device), form))


def _exempt(like: Tensor) -> bool:
    if isinstance(like, FakeTensor) or torch.compiler.is_compiling():
        return True  # nothing is computed
    if like.device.type == "cuda":
        return torch.cuda.is_current_stream_capturing()  # where nothing may wait; proved before
    return not interpreted_too


def _difference(
    found: T, exact: T, flat: Callable[[T], Tensor], learned: Sequence[Tensor]
) -> str | None:
    """How far a result or a gradient is off, if it is too far."""
    ours, theirs = flat(found), flat(exact)
    allowed = TOLERANCES.get(ours.dtype, TOLERANCES[torch.float32])
    if wrong := _far("its result", ours, theirs, allowed):
        return wrong
    learned = [x for x in learned if x.requires_grad]
    if not (ours.requires_grad and learned):
        return None
    along = torch.linspace(-1, 1, ours.numel(), device=ours.device).view(ours.shape).to(ours)
    gradients = (
        torch.autograd.grad(x, learned, along, retain_graph=True, allow_unused=True)
        for x in (ours, theirs)
    )
    for a, b in zip(*gradients, strict=True):
        if a is None or b is None:
            if a is not b:
                return "a gradient is missing"
        elif wrong := _far("a gradient", a, b, _FURTHER * allowed):
            return wrong
    return None


def _far(what: str, ours: Tensor, theirs: Tensor, allowed: float) -> str | None:
    if ours.shape != theirs.shape:
        return f"{what} is {tuple(ours.shape)}, and should be {tuple(theirs.shape)}"
    a, b = ours.detach().double(), theirs.detach().double()
    off = float((a - b).norm() / b.norm().clamp_min(1e-30))
    most = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
    if off <= allowed and most <= _FURTHER * allowed:
        return None
    return f"{what} is {off:.1e} from torch's own, its worst element {most:.1e}"


def _refuse(place: str, form: str, why: str) -> None:
    global _warned
    with _lock:
        _known[place, form] = why
        first, _warned = not _warned, True
    if first:
        warnings.warn(
            f"the kernel for {form} failed on {place}: {why}. Plain torch serves in its place, and "
            "so it does for other kernels that fail. Please report this line, with what `hookctl "
            "bench device` writes",
            RuntimeWarning,
            stacklevel=3,
        )


# -- what is remembered ----------------------------------------------------------------------------


def folder() -> Path:
    """Where agreement is remembered."""
    own = os.environ.get("HOOKCTL_CACHE")
    if own:
        return Path(own) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hookctl" / "kernels"


@lru_cache
def place_of(device: torch.device) -> str:
    """Everything outside a call that may change what a kernel does."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        name = getattr(chip, "gcnArchName", None) or f"sm_{chip.major}{chip.minor}"
        driver = torch.version.hip or getattr(torch._C, "_cuda_getDriverVersion", lambda: "?")()
        where = f"{chip.name} ({name}), driver {driver}"
    else:
        where = "the interpreter"
    return f"{where}, torch {torch.__version__}, triton {triton}, kernels {_sources()}"


@lru_cache
def _sources() -> str:
    """A hash of the kernels and their tables."""
    found = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".json")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _file(place: str) -> Path:
    return folder() / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.json"


def _forms(place: str) -> list[str]:
    """What the file of a place says; nothing where there is none, or one that can't be read."""
    try:
        said = json.loads(_file(place).read_text())
        forms = said["proved"] if said["place"] == place else []
        return [form for form in forms if isinstance(form, str)]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return []


def _remember(place: str) -> None:
    if place not in _read:
        _read.add(place)
        for form in _forms(place):
            _known.setdefault((place, form), None)


def _agreed(place: str, form: str) -> None:
    """Keep that a form is right; in memory only where the folder can't be written to."""
    with _lock:
        _known[place, form] = None
        try:
            path = _file(place)
            path.parent.mkdir(parents=True, exist_ok=True)
            proved = sorted({*_forms(place), form})  # other processes add theirs
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"place": place, "proved": proved}, file, indent=1)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except (OSError, RuntimeError):  # read-only, full, or no home
            return
