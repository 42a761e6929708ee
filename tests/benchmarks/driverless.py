"""Triton's way of launching, without a device at its end: kernels are bound, looked up and handed
over as on one, but nothing is compiled, and the launcher launches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _Driver:
    """What the launch path asks of a device's driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Kernel(CompiledKernel):
    """One that was loaded."""

    def __init__(self) -> None:
        self.module, self._module_pid, self.name, self.src = "loaded", None, "kernel", None
        self.function, self.packed_metadata, self._run = self, None, lambda *arguments: None

    def __del__(self) -> None:
        pass


@contextmanager
def driverless() -> Iterator[None]:
    def compiled(self: Any, key: Any, signature: Any, device: Any, *_: Any) -> _Kernel:
        self.device_caches[device][0][key] = kernel = _Kernel()
        return kernel

    with (
        patch.object(driver, "_active", _Driver()),
        patch.object(JITFunction, "_do_compile", compiled),
    ):
        yield
