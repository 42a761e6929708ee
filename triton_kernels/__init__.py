"""Fused attention kernels, imported as `hookctl.kernels`. They know tensors only.

A folder per operator: `reference` is its twin in plain torch, under the same names; `forward` and
`backward` have the Triton kernels, their launches and the operators of torch; the folder's own name
gives the function that a caller uses. `common` has what they share. Triton has no wheel for macOS
and Windows: everything can be imported without it, and `available` says why a kernel can't run.
"""

from hookctl.kernels.common.launch import available

__all__ = ["available"]
