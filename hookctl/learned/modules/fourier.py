"""Fourier features of coordinates, as GLIGEN and InstanceDiffusion take them."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 100.0  # the frequencies are BASE ** (k / K)


def fourier(x: Tensor, frequencies: int) -> Tensor:
    """sin and cos of coordinates at K = `frequencies` frequencies f_k = 100^(k/K), without 2 pi.

    Receives: x [..., m], coordinates from 0 to 1. Returns: [..., 2 K m], frequency by frequency,
    all sines of one and then all its cosines: index = k 2m + (0 | m) + coordinate. (GLIGEN,
    `FourierEmbedder`; K is 8 there and 16 in InstanceDiffusion.)
    """
    k = torch.arange(frequencies, device=x.device, dtype=x.dtype)
    angles = x[..., None, :] * (BASE ** (k / frequencies))[:, None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
