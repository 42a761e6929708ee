"""Otsu's threshold: the cut that tells a dark class from a bright one.

Otsu, "A Threshold Selection Method from Gray-Level Histograms", 1979: of all cuts the one whose two
classes differ most, w0 w1 (mu0 - mu1)^2. Here of the values themselves, without a histogram.
"""

from __future__ import annotations

import torch
from torch import Tensor


def otsu(x: Tensor) -> float:
    """The middle between the two classes' nearest values; of equal values that value."""
    values = x.detach().double().flatten().sort().values
    n, total = len(values), values.sum()
    below = values.cumsum(0)[:-1]
    count = torch.arange(1, n, dtype=torch.float64, device=values.device)
    between = (below / count - (total - below) / (n - count)) ** 2 * count * (n - count)
    if n < 2 or not bool(between.max() > 0):
        return float(values[-1])
    cut = int(between.argmax())
    return float((values[cut] + values[cut + 1]) / 2)
