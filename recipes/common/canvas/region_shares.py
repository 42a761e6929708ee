"""How a grid of tokens or cells is divided among regions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookctl.address.regions import Region


def region_shares(
    regions: Sequence[Region],
    height: int,
    width: int,
    *,
    edge: float = 0.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The share of each region in every cell, float32 [regions, height, width]; sums of at most 1.

        m_r = a_r c_r / max(1, sum_s a_s c_s)

    c_r: how much of the cell lies in region r, 0 or 1, or with a soft border of width `edge` (a
    fraction of the shorter side) anything between; a_r: the weights, 1 unless given.
    """
    if not regions:
        return torch.zeros(0, height, width)
    covered = torch.stack(
        [
            region.feathered(height, width, edge)
            if edge
            else region.tokens(height, width).float().reshape(height, width)
            for region in regions
        ]
    )
    if weights is not None:
        covered = covered * torch.tensor(weights)[:, None, None]
    return covered / covered.sum(0).clamp_min(1)
