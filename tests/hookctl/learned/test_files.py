"""Files of weights: every format, and what hostile or damaged ones come to."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hookctl.errors import InputError
from hookctl.learned.files import read


class Calls:
    """Is pickled as a call of a function."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.made = (function, given)

    def __reduce__(self) -> Any:
        return self.made


class Config:
    """Of a package that who reads the file may not have."""

    def __init__(self) -> None:
        self.inner = {"name": torch.nn.Linear, "sizes": {1, 2}, "more": [self.__class__]}


class Names(dict[str, Any]):
    """A table of a class of its own."""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAP", str(tmp_path / "ran"))
    return tmp_path / "ran"


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    whole = torch.randn(6, 8)
    return {
        "a.weight": whole[:4],
        "a.shared": whole[2:, 1:5].t(),
        "gate": torch.tensor(0.5),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "ids": torch.arange(5),
        "none": torch.empty(0, 4),
    }


def same(found: Any, wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


SAVES: dict[str, Callable[[Any, Path], None]] = {
    "zip": lambda data, path: torch.save(data, path),
    "legacy": lambda data, path: torch.save(data, path, _use_new_zipfile_serialization=False),
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "no more": dict,
    "a class of a package": lambda: {"config_dict": vars(Config())},
    "an object of a package": lambda: {"config": Config()},
    "a namespace": lambda: {"args": argparse.Namespace(path=Path("x"), rate=1e-4)},
    "a table of a class": lambda: {"extra": Names(x=1)},
}


@pytest.mark.parametrize("format", SAVES)
@pytest.mark.parametrize("more", CONFIGS)
def test_pickles(format: str, more: str, tmp_path: Path) -> None:
    path = tmp_path / "any.name"
    parts = {"model": OrderedDict(weights()), "deep": defaultdict(dict, {0: {"x": torch.ones(2)}})}
    SAVES[format](parts | CONFIGS[more](), path)
    found = read(path)
    wanted = {f"model.{key}": tensor for key, tensor in weights().items()}
    same(found.tensors, wanted | {"deep.0.x": torch.ones(2)})
    if more == "no more":
        assert not found.notes
    elif more == "an object of a package":
        assert "not loaded, since they are no weights" in found.notes[0]
        assert "Config" in found.notes[0]


@pytest.mark.parametrize("format", SAVES)
def test_parameters_of_a_module(format: str, tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    data = {"p": torch.nn.Parameter(torch.ones(2)), **layer.state_dict(), "x": Config()}
    SAVES[format](data, tmp_path / "a")
    found = read(tmp_path / "a").tensors
    same(found, {"p": torch.ones(2), "weight": layer.weight.data, "bias": layer.bias.data})
    assert not any(tensor.requires_grad for tensor in found.values())


def test_safetensors_by_any_name(tmp_path: Path) -> None:
    data = {key: tensor.contiguous() for key, tensor in weights().items()}
    save_file(data, tmp_path / "model.ckpt")
    found = read(tmp_path / "model.ckpt").tensors
    same({key: found[key] for key in data}, data)


def test_one_file_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no file of weights"):
        read(tmp_path)
    torch.save({"x": torch.ones(2)}, tmp_path / "optimizer.bin")
    assert list(read(tmp_path).tensors) == ["x"]
    torch.save({"y": torch.ones(2)}, tmp_path / "other.bin")
    with pytest.raises(InputError, match=r"holds 2 files of weights \(optimizer.bin, other.bin\)"):
        read(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(read(tmp_path).tensors) == ["w"]
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read(tmp_path / "gone")


# -- hostile ---------------------------------------------------------------------------------------

SHELL = "echo ran > $TRAP"
CALLS: dict[str, Callable[[], Any]] = {
    "os.system": lambda: Calls(os.system, SHELL),
    "subprocess": lambda: Calls(subprocess.call, ["sh", "-c", SHELL]),
    "eval": lambda: Calls(eval, "__import__('os').system('echo ran > $TRAP')"),
    "exec": lambda: Calls(exec, "import os; os.system('echo ran > $TRAP')"),
    "a pickle in a pickle": lambda: Calls(pickle.loads, pickle.dumps(Calls(os.system, SHELL))),
    "open": lambda: Calls(open, os.environ["TRAP"], "w"),
}


@pytest.mark.parametrize("format", SAVES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", ["alone", "beside weights", "as a key", "further in"])
def test_nothing_is_run(format: str, call: str, place: str, tmp_path: Path, trap: Path) -> None:
    bomb = CALLS[call]()
    data: Any = {
        "alone": bomb,
        "beside weights": {**weights(), "x": bomb},
        "as a key": {bomb: torch.ones(2)},
        "further in": {"model": weights(), "opt": [{"x": (bomb,)}]},
    }[place]
    SAVES[format](data, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="would call '.*' when it is read.*nothing of it was run"):
        read(tmp_path / "weights.pth")
    assert not trap.exists()


def archive(path: Path, code: bytes, **members: bytes) -> None:
    """A file of torch.save with a pickle of our own."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a/data.pkl", code)
        made.writestr("a/version", b"3\n")
        made.writestr("a/byteorder", b"little")
        for name, content in members.items():
            made.writestr(f"a/data/{name.strip('_')}", content)


def storage(key: str = "0", count: str = "I4\n") -> bytes:
    """A storage of floats, as torch names it in a pickle of protocol 2."""
    words = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX" + struct.pack("<I", len(key))
    return words + key.encode() + b"X\x03\0\0\0cpu" + count.encode() + b"tQ"


def tensor(size: str, stride: str, offset: str = "I0\n", of: bytes = b"") -> bytes:
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (of or storage())
    return head + f"{offset}({size}t({stride}tI00\nccollections\nOrderedDict\n)RtR".encode()


def table(value: bytes) -> bytes:
    return b"\x80\x02}X\x01\0\0\0x" + value + b"s."


FLOATS = struct.pack("<4f", 1, 2, 3, 4)
UNKNOWN = b"cnowhere\nThing\n)R"  # what torch's own reader refuses


@pytest.mark.parametrize("more", [b"", UNKNOWN + b"0"], ids=["torch's reader", "ours"])
def test_a_pickle_of_our_own_is_read(more: bytes, tmp_path: Path) -> None:
    """So that those below are refused for what is wrong in them."""
    archive(tmp_path / "a", table(more + tensor("I4\n", "I1\n")), _0=FLOATS)
    same(read(tmp_path / "a").tensors, {"x": torch.tensor([1.0, 2, 3, 4])})


SPOILT: dict[str, bytes] = {
    "larger than stored": tensor("I5\n", "I1\n"),
    "far larger": tensor("I1000000\nI1000000\n", "I1000000\nI1\n"),
    "behind the end": tensor("I2\n", "I1\n", "I3\n"),
    "a negative stride": tensor("I2\n", "I-1\n"),
    "a negative offset": tensor("I2\n", "I1\n", "I-8\n"),
    "a negative size": tensor("I-2\n", "I1\n"),
    "a size without end": tensor("L" + "9" * 4000 + "L\n", "I1\n"),
    "fewer strides": tensor("I2\nI2\n", "I1\n"),
    "a storage of no record": tensor("I2\n", "I1\n", of=storage("../../etc/passwd")),
    "a storage too large": tensor("I900\n", "I1\n", of=storage("0", "I900000000000\n")),
    "a storage that is none": tensor("I2\n", "I1\n", of=b"I5\n"),
    "a list set as a table": tensor("I4\n", "I1\n") + b"X\x01\0\0\0yI1\ns",
    "an extension": b"\x82\x01",
    "nothing to take": b"0000",
    "a word that is cut off": b"X\xff\xff\xff\x7fabc",
    "a place without end": b"r\xff\xff\xff\xff" + b"a" * 10,
    "no end": b"(" * 100_000,
}


@pytest.mark.parametrize("more", [b"", UNKNOWN + b"0"], ids=["torch's reader", "ours"])
@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_pickle(name: str, more: bytes, tmp_path: Path) -> None:
    archive(tmp_path / "a", table(more + SPOILT[name]), _0=FLOATS)
    with pytest.raises(InputError, match="can't be read as a file of torch.save") as raised:
        read(tmp_path / "a")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(X\x10\0\0\0echo ran > $TRAPtR",
        b"(cos\nsystem\nX\x10\0\0\0echo ran > $TRAPo",
        b"(X\x10\0\0\0echo ran > $TRAPios\nsystem\n",
        b"cos\nsystem\n(X\x10\0\0\0echo ran > $TRAPt\x81",
        b"ctorch.serialization\nos.system\n(X\x10\0\0\0echo ran > $TRAPtR",
        b"X\x02\0\0\0osX\x06\0\0\0system\x93(X\x10\0\0\0echo ran > $TRAPtR",
    ],
    ids=["REDUCE", "OBJ", "INST", "NEWOBJ", "a dotted name", "STACK_GLOBAL"],
)
@pytest.mark.parametrize("more", [b"", UNKNOWN + b"0"], ids=["torch's reader", "ours"])
def test_no_opcode_runs(code: bytes, more: bytes, tmp_path: Path, trap: Path) -> None:
    archive(tmp_path / "a", table(more + code), _0=FLOATS)
    with pytest.raises(InputError):
        read(tmp_path / "a")
    assert not trap.exists()


def test_torch_is_as_it_was(tmp_path: Path) -> None:
    """A state that is set on a function of torch, or on a class, goes nowhere."""
    rebuild = torch._utils._rebuild_tensor_v2
    before = dict(vars(rebuild)), dict(vars(OrderedDict))
    state = b"}X\x05\0\0\0spoilI1\nsb"
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
        code = b"\x80\x02" + UNKNOWN + b"0}X\x01\0\0\0x" + name + state + b"s."
        archive(tmp_path / "a", code)
        with pytest.raises(InputError, match="holds no tensors"):
            read(tmp_path / "a")
    assert before == (dict(vars(rebuild)), dict(vars(OrderedDict)))


@pytest.mark.slow
def test_tables_in_themselves(tmp_path: Path) -> None:
    own: dict[str, Any] = {"x": torch.ones(2)}
    own["own"] = own
    wide: Any = {"x": torch.ones(2)}
    for _ in range(12):
        wide = [wide] * 50
    deep: Any = torch.ones(2)
    for _ in range(400):
        deep = [deep]
    for number, data in enumerate((own, wide, deep)):
        path = tmp_path / str(number)
        torch.save(data, path)
        with pytest.raises(InputError, match="nested too deeply"):
            read(path)


def test_the_same_name_twice(tmp_path: Path) -> None:
    torch.save({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}, tmp_path / "a")
    with pytest.raises(InputError, match="holds 'a.b' twice"):
        read(tmp_path / "a")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\u202etxet", "x" * 3000])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({name: torch.ones(2)}, tmp_path / "a.bin")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.bin"):
        with pytest.raises(InputError, match="no name of a weight|nested too deeply") as raised:
            read(path)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 300


def test_a_small_file_of_large_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(()).expand(2**20, 2**20)}, tmp_path / "a.bin")
    with pytest.raises(InputError, match="its tensors take 4,096 GiB, and the file has 0.0 MiB"):
        read(tmp_path / "a.bin")


# -- damaged or something else ---------------------------------------------------------------------


def saved(data: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(data, file, **options)
    return file.getvalue()


def header(said: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    said = said.encode() if isinstance(said, str) else said
    return struct.pack("<Q", len(said) if length is None else length) + said + data


def entry(dtype: str = "F32", shape: Any = (2,), at: Any = (0, 8)) -> str:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": at}})


def program() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members.items():
            made.writestr(name.replace("__", "/").replace("_", "."), content)
    return file.getvalue()


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "zeros": (lambda: bytes(1000), "holds zeros"),
    "text": (lambda: b"weights", "is no file of weights; give a safetensors file or"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "a page": (lambda: b"\n<!DOCTYPE html><html>", "is a web page"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(20), "compressed by gzip; unpack it"),
    "a plain pickle": (lambda: pickle.dumps({"x": 1}), "is a pickle, but none of torch.save"),
    "a call alone": (lambda: pickle.dumps(Calls(os.system, SHELL)), "none of torch.save"),
    "cut off": (lambda: saved(weights())[:-30], "is cut off or damaged"),
    "half": (lambda: saved({"x": torch.ones(9999)})[:20_000], "is cut off or damaged"),
    "legacy, cut off": (
        lambda: saved(weights(), _use_new_zipfile_serialization=False)[:-40],
        "can't be read as a file of torch.save",
    ),
    "legacy, its start": (
        lambda: saved(weights(), _use_new_zipfile_serialization=False)[:60],
        "can't be read as a file of torch.save",
    ),
    "no tensors": (lambda: saved({"x": 1, "y": "z"}), "holds no tensors"),
    "TorchScript": (program, "is a TorchScript program, which is not run"),
    "an archive": (lambda: zipped(model_bin=b"x"), r"is an archive \(model.bin\); unpack it"),
    "an archive in one": (lambda: zipped(a_zip=zipped(b_zip=b"")), r"is an archive \(a.zip\)"),
    "compressed": (lambda: zipped(a__data_pkl=bytes(10**6)), "is compressed, which torch.save"),
    "a header without end": (lambda: header("{}", length=2**63), "its header is said to have"),
    "a header behind the end": (lambda: header(entry(), length=10**6), "its header is said"),
    "a header too large": (lambda: header("{" + " " * 100, length=2**40), "its header is said"),
    "a header that is none": (lambda: header("{]}"), "can't be read as safetensors"),
    "a header in bytes": (lambda: header(b"{\xff\xfe}"), "can't be read as safetensors"),
    "a header in headers": (lambda: header('{"a":' * 20_000), "can't be read as safetensors"),
    "an empty header": (lambda: header("{}"), "holds no tensors"),
    "data missing": (lambda: header(entry(), b"\0" * 7), "can't be read as safetensors"),
    "data twice": (lambda: header(entry(), b"\0" * 90), "can't be read as safetensors"),
    "another shape": (lambda: header(entry(shape=(3,)), bytes(8)), "can't be read as safetensors"),
    "a size without end": (
        lambda: header(entry(shape=(2**40, 2**40)), bytes(8)),
        "can't be read as safetensors",
    ),
    "no such dtype": (lambda: header(entry("F7"), bytes(8)), "can't be read as safetensors"),
    "backwards": (lambda: header(entry(at=(8, 0)), bytes(8)), "can't be read as safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_file_of_weights(name: str, tmp_path: Path, trap: Path) -> None:
    make, says = OTHERS[name]
    for ending in ("safetensors", "bin"):
        path = tmp_path / f"a.{ending}"
        path.write_bytes(make())
        with pytest.raises(InputError, match=says) as raised:
            read(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not trap.exists()
