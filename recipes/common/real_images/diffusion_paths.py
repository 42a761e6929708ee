"""The paths of MultiDiffusion: what the model sees of a canvas in a step, tile by tile.

Bar-Tal et al., arXiv 2302.08113: a path is a tile under one text, and counts as its mask says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.address.per_prompt import PerPrompt
from hookctl.address.regions import Region
from hookctl.recipes.common.canvas.region_shares import region_shares
from hookctl.recipes.common.canvas.tiles import Tile


@dataclass(frozen=True, eq=False)
class DiffusionPath:
    """A tile under one text.

    region: whose text, counted from 1; 0: the prompt's own, of all cells in no region. weight: what
    the path counts in each row, [rows, height, width] of the tile.
    """

    tile: Tile
    region: int
    weight: Tensor


def paths_of(
    tiles: Sequence[Tile], regions: PerPrompt[Region], prompts: Sequence[int]
) -> list[DiffusionPath]:
    """The paths that count anything, for rows of these prompts."""
    size = tiles[0].canvas_height, tiles[0].canvas_width
    masks = {p: _masks(regions[p], regions.longest, *size) for p in set(prompts)}
    paths = [
        DiffusionPath(tile, region, torch.stack([tile.cut(masks[p][region]) for p in prompts]))
        for tile in tiles
        for region in range(regions.longest + 1)
    ]
    return [path for path in paths if bool(path.weight.any())]


def _masks(regions: Sequence[Region], count: int, height: int, width: int) -> Tensor:
    """m_0 ... m_count of one prompt, [1 + count, height, width]; 0 for regions that it lacks."""
    of_regions = region_shares(regions, height, width)
    missing = torch.zeros(count - len(of_regions), height, width)
    rest = 1 - of_regions.sum(0, keepdim=True)
    return torch.cat([torch.where(rest < 1e-6, 0.0, rest), of_regions, missing])
