"""Relative errors by name, with the tolerance beside the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Of the norm of the difference to the norm of the float64 reference.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that are exact in `dtype`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """`got` is finite and within the relative error `tolerance` of `want`."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:g}"
