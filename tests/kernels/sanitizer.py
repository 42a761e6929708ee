"""What compute-sanitizer finds on a GPU, found in Triton's interpreter.

The interpreter runs the programs of a launch one after the other on the real addresses of their
tensors. So a read beyond a tensor goes unseen where memory happens to be there, and two programs
that write one place agree on who was last. Under `watched`, a kernel may touch only the elements
of the tensors that it was given (memcheck), no program may read or write what another one writes
(racecheck), masked loads without a stand-in give garbage, as they may on a GPU (initcheck), and an
offset that is promised to be a multiple must be one (a vector load that is not aligned is a fault).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

_NOBODY, _SEVERAL = -1, -2
_LARGEST = 1 << 24  # bytes; of larger memory only the ends are watched


class Violation(Exception):
    """A kernel did what it may not do."""


class _Memory:
    """One storage that a launch was given, and who did what to each of its bytes."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, size = storage.data_ptr(), storage.nbytes()
        self.end = self.start + size
        self.whole = size > _LARGEST
        if self.whole:
            return
        self.given = torch.zeros(size, dtype=torch.uint8)
        self.writer = np.full(size, _NOBODY, np.int32)
        self.reader = np.full(size, _NOBODY, np.int32)

    def admit(self, x: Tensor) -> None:
        """Let programs touch the elements of a view."""
        if self.whole:
            return
        width = x.element_size()
        shape = [1 if step == 0 else n for n, step in zip(x.shape, x.stride(), strict=True)]
        steps = [step * width for step in x.stride()]
        self.given.as_strided((*shape, width), (*steps, 1), x.storage_offset() * width).fill_(1)

    def touch(self, at: Any, program: int, *, write: bool) -> int:
        """How many of the elements that begin at these bytes are given."""
        if self.whole:
            return len(at)
        given = at[self.given.numpy()[at] != 0]
        (self._write if write else self._read)(given, program)
        return len(given)

    def _read(self, at: Any, program: int) -> None:
        self._others(self.writer[at], program, "reads what program", "writes")
        reader = self.reader[at]
        first = (reader == _NOBODY) | (reader == program)
        self.reader[at] = np.where(first, program, _SEVERAL)

    def _write(self, at: Any, program: int) -> None:
        if len(np.unique(at)) < len(at):
            raise Violation(f"program {program} writes one place twice at once")
        self._others(self.writer[at], program, "writes where program", "writes too")
        self._others(self.reader[at], program, "writes what program", "reads")
        self.writer[at] = program

    def _others(self, found: Any, program: int, does: str, did: str) -> None:
        others = found[(found != _NOBODY) & (found != program)]
        if len(others):
            other = "of several" if others[0] == _SEVERAL else others[0]
            raise Violation(f"program {program} {does} {other} {did}")


class _Launch:
    """The memory of one launch. Programs are counted through the grid."""

    def __init__(self, tensors: list[Tensor]) -> None:
        memories: dict[int, _Memory] = {}
        for x in tensors:
            if x.numel():
                storage = x.untyped_storage()
                memory = memories.setdefault(storage.data_ptr(), _Memory(storage))
                memory.admit(x)
        self.memories = list(memories.values())

    def touch(self, addresses: Any, width: int, program: int, *, write: bool) -> None:
        addresses = addresses.astype(np.int64).ravel()
        left = len(addresses)
        for memory in self.memories:
            inside = (addresses >= memory.start) & (addresses + width <= memory.end)
            left -= memory.touch(addresses[inside] - memory.start, program, write=write)
        if left:
            verb = "writes" if write else "reads"
            raise Violation(f"program {program} {verb} {left} elements outside its tensors")


@contextmanager
def watched() -> Iterator[None]:
    """Raise (from the launch) for whatever a kernel does that it may not do."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    on_host, hint = executor._init_args_hst, interpreter.TensorHandle.set_attr
    launch = _Launch([])

    def started(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal launch
        found = on_host(self, args, kwargs)
        launch = _Launch([x for x in (*found[0], *found[1].values()) if isinstance(x, Tensor)])
        return found

    def program(self: Any) -> int:
        (x, y, z), (_, of_y, of_z) = self.grid_idx, self.grid_dim
        return int((x * of_y + y) * of_z + z)

    def touch(self: Any, pointers: Any, mask: Any, *, write: bool) -> None:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
        launch.touch(addresses[wanted.astype(bool)], width, program(self), write=write)

    def loaded(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        touch(self, pointers, mask, write=False)
        found = load(self, pointers, mask, other, *rest)
        if other is None:
            floats = np.issubdtype(found.data.dtype, np.floating)
            garbage = np.nan if floats else np.iinfo(found.data.dtype).max
            found.data = np.where(mask.data, found.data, garbage).astype(found.data.dtype)
        return found

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch(self, pointers, mask, write=True)
        return store(self, pointers, value, mask, *rest)

    def hinted(self: Any, name: str, values: Any) -> None:
        (count,) = (int(getattr(x, "value", x)) for x in values)
        if name.startswith("tt.divis") and (self.data % count).any():
            raise Violation(f"{self.data} is promised to be a multiple of {count}")
        if name == "tt.constancy" and np.ptp(self.data.reshape(-1, count), axis=1).any():
            raise Violation(f"{self.data} is promised to be the same {count} times")
        hint(self, name, values)

    with (
        patch.object(executor, "_init_args_hst", started),
        patch.object(builder, "create_masked_load", loaded),
        patch.object(builder, "create_masked_store", stored),
        patch.object(interpreter.TensorHandle, "set_attr", hinted),
    ):
        yield
