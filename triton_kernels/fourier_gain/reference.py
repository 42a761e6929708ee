"""The low-frequency gain in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fourier_gain(x: Tensor, gain: Tensor | float) -> Tensor:
    """F of a feature map; see `hookctl.kernels.fourier_gain`."""
    height, width = x.shape[-2:]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    flat = wide.flatten(2)
    waves = _waves(height, width, wide.dtype, x.device)
    share: Tensor | float
    if isinstance(gain, Tensor):
        share = (1 - gain.to(wide).expand(x.shape[:2])[..., None]) / (height * width)
    else:
        share = (1 - gain) / (height * width)
    amounts = (flat @ waves.mT) * share
    return (flat - amounts @ waves).unflatten(2, (height, width)).to(x.dtype)


def _waves(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mean and the cosine and sine of the three lowest waves, [7, pixels]; of the one there is,
    [3, pixels], in a line, and the mean alone for a single cell."""
    rows = torch.arange(height, dtype=dtype, device=device)[:, None] * (2 * math.pi / height)
    columns = torch.arange(width, dtype=dtype, device=device)[None] * (2 * math.pi / width)
    found = [torch.ones(height, width, dtype=dtype, device=device)]
    angles = [rows] * (height > 1) + [columns] * (width > 1)
    if len(angles) == 2:
        angles.append(rows + columns)
    for angle in angles:
        found += [angle.cos().expand(height, width), angle.sin().expand(height, width)]
    return torch.stack(found).flatten(1)
