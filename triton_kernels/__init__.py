"""Fused attention kernels, imported as `hookctl.kernels`. They know tensors only.

One file per kernel, in this order: the reference in plain torch, the forward and backward
kernels, the launch table, the custom operator with its fake implementation and its gradient, the
public function. Triton has no wheel for macOS and Windows, so nothing is imported from here that
needs it: ask `available` first, then import the kernel's own module.
"""

from hookctl.kernels.common.launch import available

__all__ = ["available"]
