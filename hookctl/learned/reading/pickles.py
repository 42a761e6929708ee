"""Pickles of tensors, read without running what they name.

A pickle is a program: it names functions and calls them. Here a name stands for itself, and only
those by which torch writes tensors do anything. Whatever else is made becomes an inert object that
takes all and keeps nothing, so a file that also holds its configuration (OmegaConf, argparse) gives
its tensors, without the packages of that configuration.

`torch.load(path, pickle_module=Reader(), weights_only=False)` reads by it: torch subclasses its
`Unpickler` and sees to storages alone. The unpickler is Python's own in Python, not in C: the other
takes memory as a file tells it to.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

# Modules and functions that are in a pickle for one reason; "commands" was Python 2's subprocess.
_RUN = frozenset(
    "os posix nt subprocess commands sys shutil socket runpy importlib pty ctypes webbrowser code "
    "codeop timeit pdb bdb pickle _pickle marshal multiprocessing pip asyncio http urllib".split()
)
_BUILTINS = ("builtins", "__builtin__", "io", "_io")
_RUN_BUILTINS = frozenset("eval exec execfile compile __import__ open breakpoint input".split())


class HostileError(pickle.UnpicklingError):
    """A pickle would run something if it were read as usual."""


class Inert:
    """In place of an object whose class is not loaded."""

    def append(self, *_: Any) -> None: ...

    extend = add = __setitem__ = append


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> Tensor:
    """A tensor over a storage, and never over what lies behind it."""
    dtype = next((one for one in more if isinstance(one, torch.dtype)), storage.dtype)
    memory = storage.untyped()
    size, stride = tuple(size), tuple(stride)
    whole = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**48 for n in whole):
        raise pickle.UnpicklingError("a tensor has no sensible shape")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
    if all(size) and last * dtype.itemsize > memory.nbytes():
        raise pickle.UnpicklingError("a tensor is larger than what is stored of it")
    return torch.empty(0, dtype=dtype).set_(memory, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _ordered(*pairs: Any) -> dict[Any, Any]:
    return dict(*pairs)


def _defaults(*_: Any) -> dict[Any, Any]:
    return {}


_MAKERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): _defaults,
}


class _Unpickler(pickle._Unpickler):
    """skipped: gets the names of what is not loaded."""

    skipped: set[str]

    def find_class(self, module: str, name: str, /) -> Any:
        root = module.partition(".")[0]
        runs = root in _RUN or (root in _BUILTINS and name.partition(".")[0] in _RUN_BUILTINS)
        if runs:
            raise HostileError(f"{module}.{name}")
        if maker := _MAKERS.get((module, name)):
            return maker
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if root not in _BUILTINS:
            self.skipped.add(f"{module}.{name}")
        return Inert()

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"extension {code} is not known")

    def _make(self, maker: Any, given: Any, *_: Any) -> None:
        # A maker is known by itself: what a file put in its place is not in the table.
        known = any(maker is one for one in _MAKERS.values())
        self.append(maker(*given) if known else Inert())  # type: ignore[attr-defined]

    def _instantiate(self, maker: Any, given: Any) -> None:  # of INST and OBJ
        self._make(maker, given)

    def _reduce(self) -> None:  # also NEWOBJ
        given, maker = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._make(maker, given)

    def _new_with_names(self) -> None:
        self.stack.pop()  # type: ignore[attr-defined]
        self._reduce()

    def _build(self) -> None:  # the state of an object: none of ours has any
        self.stack.pop()  # type: ignore[attr-defined]

    def _stored(self) -> None:
        """A storage; torch would look for the source of a class of modules, and may write files."""
        named = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(named, tuple) and named[:1] in (("module",), (b"module",)):
            self.stack[-1] = Inert()  # type: ignore[attr-defined]
        else:
            self.load_binpersid()  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _new_with_names,
        pickle.BUILD[0]: _build,
        pickle.BINPERSID[0]: _stored,
    }


class Reader:
    """What torch takes as a pickle module; skipped: the names of what was not loaded."""

    __name__ = "hookctl.learned.pickles"

    def __init__(self) -> None:
        self.skipped: set[str] = set()
        self.Unpickler = type("Unpickler", (_Unpickler,), {"skipped": self.skipped})

    def load(self, file: IO[bytes], **options: Any) -> Any:
        return self.Unpickler(file, **options).load()
