"""Scale the lowest frequencies of a feature map, without a Fourier transform (FreeU, ScaleU).

The published filter scales the window {-1, 0}^2 of the shifted spectrum by a gain and takes the
real part (Si et al., arXiv 2309.11497; Wang et al., arXiv 2402.03290). That is a projection on the
mean and on the cosines and sines of the waves (1,0), (0,1), (1,1), all with the same factor:

    F(x) = x - (1 - gain) / (H W) * sum_i w_i <x, w_i>        i = 1 .. 7

since a wave has squared norm H W / 2 and half of its two frequencies lies in the window, or H W and
all of it where the two are one. Seven inner products per channel, any size and dtype. F is its own
transpose, so its gradient is F of the gradient.
"""

from __future__ import annotations

from torch import Tensor

from hookctl.kernels.common import proof
from hookctl.kernels.common.guard import fused
from hookctl.kernels.fourier_gain import forward, reference

__all__ = ["fourier_gain"]


def fourier_gain(x: Tensor, gain: Tensor | float) -> Tensor:
    """F of a feature map [rows, channels, height, width]; a gain of 1 is the identity.

    gain: a number, or a tensor that broadcasts to [rows, channels]; differentiable in both. A side
    of 1 has no waves of its own, and a single cell is its own mean. The kernel serves a GPU, plain
    torch everything else.
    Raises ValueError for anything but a feature map.
    """
    if x.dim() != 4 or 0 in x.shape[-2:]:
        raise ValueError(
            f"fourier_gain: x is {tuple(x.shape)}; give [rows, channels, height, width]"
        )
    if not fused(x) or 1 in x.shape[-2:]:
        return reference.fourier_gain(x, gain)
    learned = [value for value in (x, gain) if isinstance(value, Tensor)]
    return proof.served(
        f"the Fourier gain, {x.dtype}" + ", gradients" * any(y.requires_grad for y in learned),
        x,
        lambda: forward.fourier_gain(x, gain),
        lambda: reference.fourier_gain(x, gain),
        lambda out: out,
        learned=learned,
    )
