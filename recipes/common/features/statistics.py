"""Statistics of queries and keys over their tokens, and of features over their channels."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-5


def adain(x: Tensor, reference: Tensor) -> Tensor:
    """x with the mean and deviation of a reference, per head and channel over the tokens.

        (x - mean) / std * std_reference + mean_reference        std = sqrt(var + 1e-5)

    with the unbiased variance (Huang & Belongie, arXiv 1703.06868; the form that StyleAligned,
    arXiv 2312.02133, gives to q and k). x: [..., tokens, channels]; reference: [..., tokens',
    channels], broadcast over what comes before.
    """
    mean, std = _moments(x)
    mean_reference, std_reference = _moments(reference)
    return (x - mean) / std * std_reference + mean_reference


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the tokens; a single token has no deviation."""
    correction = min(1, x.shape[-2] - 1)
    var, mean = torch.var_mean(x, -2, correction=correction, keepdim=True)
    return mean, (var + _EPS).sqrt()


def structure(h: Tensor) -> Tensor:
    """The channel mean of features, scaled to 0..1 per image: [rows, 1, height, width].

    h: [rows, channels, height, width]. What FreeU and ScaleU call the structure of the features.
    """
    mean = h.mean(1, keepdim=True)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    # A constant feature map has no structure to follow: 0 everywhere, not 0 / 0.
    return (mean - low) / (high - low).clamp_min(1e-12)
