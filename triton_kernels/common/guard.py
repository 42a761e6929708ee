"""Triton, where it is installed; without it kernels can be imported, for their references."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.launch import available, interpreting

tl: Any = None
try:
    import triton.language
    from triton import jit
except ImportError:

    def jit(fn: Any) -> Any:
        return fn

    def constexpr(value: Any) -> Any:
        return value
else:
    tl = triton.language
    constexpr = tl.constexpr


def fused(*given: Tensor) -> bool:
    """Whether kernels serve these tensors: on a GPU where they can run, and none in float64, which
    kernels would round to float32. (The interpreter is for tests, which call kernels by name.)"""
    device = given[0].device
    wide = any(x.dtype == torch.float64 for x in given)
    return device.type == "cuda" and not wide and usable(device) is None


def usable(device: torch.device | str) -> str | None:
    """Why kernels can't run on a device, None if they can. The first time, one is run.

    Triton builds its launcher with the machine's C compiler and Python's headers, and knows the
    devices of its time: an installation may lack any of them, and then SDPA serves.
    """
    why = available(device)
    if why is not None or interpreting():
        return why
    key = str(device)
    if key not in _tried and not torch.compiler.is_compiling():
        _tried[key] = _trial(torch.device(device))
    return _tried.get(key)


_tried: dict[str, str | None] = {}


@jit
def _writes_one(out_ptr):
    tl.store(out_ptr, 1)


def _trial(device: torch.device) -> str | None:
    """Why the smallest kernel can't be built and run on a device; None if it can."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        with torch.cuda.device_of(out):
            _writes_one[(1,)](out)
        if int(out) == 1:
            return None
        said = "a kernel left no trace"
    except Exception as error:  # of the compiler, the C compiler, the loader or the driver
        said = f"{type(error).__name__}: " + " ".join(str(error).split())[:300]
    why = f"Triton can't run a kernel on {device} ({said})"
    warnings.warn(f"{why}; attention goes by SDPA", RuntimeWarning, stacklevel=2)
    return why


def form(kernel: Any, element: str, **given: Any) -> dict[str, Any]:
    """The types of a kernel's arguments as a usual call has them, for `Specimen`.

    element: "fp16", say, of every pointer that is not `given`; strides are multiples of 16, but for
    those of channels, which are 1.
    """

    def usual(name: str) -> Any:
        if name.endswith("_ptr"):
            return f"*{element}:16"
        if "stride" in name and not name.endswith("_stride_d"):
            return "i32:16"
        return {"scale": "fp32", "UPCAST": False}.get(name, "i32")

    return {name: usual(name) for name in kernel.arg_names} | given
