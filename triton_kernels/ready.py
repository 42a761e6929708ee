"""Launches that are made again and again, with arguments that differ in tensors alone.

Triton looks for the compiled kernel at every launch: it binds, inspects and hashes each argument,
which costs the host several times what the launch does. All that it compiles for are the values
of arguments, and of a tensor where it lies: on 16 bytes or not (and on AMD's devices, whether
within 2 GiB). Launched once by Triton, a kernel is therefore launched by itself where tensors lie
alike, as Triton's tutorial of the fused softmax does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

# Before 3.3 a compiled kernel took no constants among its arguments.
_BY_ITSELF = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 3)
_BYTES = 16
_FAR = 2**31


class Ready:
    """A launch of a kernel over a grid.

    constants: its arguments but for the tensors, and the compiler's options; from_tensors: gives
    those that follow from where the tensors lie.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        constants: Mapping[str, Any],
        from_tensors: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        self._kernel, self._grid, self._constants = kernel, (*grid, 1, 1)[:3], dict(constants)
        self._from_tensors = from_tensors
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, **tensors: Tensor | None) -> None:
        """The same names each time, in one order, for tensors of the same forms."""
        key = tuple([_lies(x) for x in tensors.values()])
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled(*tensors.values())
            return
        arguments = self._constants | tensors
        if self._from_tensors is not None:
            arguments |= self._from_tensors(tensors)
        made = self._kernel[self._grid](**arguments)
        if _BY_ITSELF and isinstance(made, CompiledKernel):
            self._compiled[key] = _by_itself(made[self._grid], self._kernel, arguments, tensors)


def _by_itself(
    launch: Callable[..., None], kernel: Any, arguments: Mapping[str, Any], names: Mapping[str, Any]
) -> Callable[..., None]:
    """The launch of a compiled kernel, given its tensors."""
    places = [kernel.arg_names.index(name) for name in names]
    every = [None if name in names else arguments[name] for name in kernel.arg_names]

    def run(*tensors: Tensor | None) -> None:
        given = every.copy()
        for place, x in zip(places, tensors, strict=True):
            given[place] = x
        launch(*given)

    return run


def _lies(x: Tensor | None) -> Any:
    """What Triton may compile for of where a tensor lies."""
    if x is None:
        return None
    if torch.version.hip is None:
        return x.data_ptr() % _BYTES
    return x.data_ptr() % _BYTES, x.untyped_storage().nbytes() < _FAR
