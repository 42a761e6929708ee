"""How a grid is divided among regions."""

from __future__ import annotations

import torch

from hookctl.address.per_prompt import regions
from hookctl.recipes.common.canvas.region_shares import region_shares

FULL, LEFT = (0, 0, 1, 1), "box:0,0,0.5,1"


def test_shares_are_normalised() -> None:
    both = regions([FULL, LEFT], "regions")[0]
    divided = region_shares(both, 4, 4, weights=[1.0, 3.0])
    assert torch.equal(divided.sum(0), torch.ones(4, 4))
    assert torch.equal(divided[1], torch.tensor([0.75, 0.75, 0.0, 0.0]).expand(4, 4))
    alone = region_shares(both[1:], 4, 4, weights=[0.5])
    assert alone[0, 0].tolist() == [0.5, 0.5, 0.0, 0.0]
    soft = region_shares(both[1:], 16, 16, edge=0.25)[0, 0]
    assert bool((soft.diff() <= 0).all()) and 0 < float(soft[8]) < 0.5 < float(soft[7]) < 1
