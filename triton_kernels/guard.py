"""Triton, where it is installed; without it kernels can be imported, for their references."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hookctl.kernels.launch import available

tl: Any = None
try:
    import triton.language
    from triton import jit
except ImportError:

    def jit(fn: Any) -> Any:
        return fn
else:
    tl = triton.language


def fused(x: Tensor) -> bool:
    """Whether kernels serve a tensor: on a GPU where they can run. (The interpreter is for tests,
    which call kernels by name.)"""
    return x.device.type == "cuda" and available(x.device) is None


def form(kernel: Any, element: str, **given: Any) -> dict[str, Any]:
    """The types of a kernel's arguments as a usual call has them, for `Specimen`.

    element: "fp16", say, of every pointer that is not `given`; strides are multiples of 16.
    """
    usual = {
        name: f"*{element}:16" if name.endswith("_ptr") else "i32:16" if "stride" in name else "i32"
        for name in kernel.arg_names
    }
    return usual | given
