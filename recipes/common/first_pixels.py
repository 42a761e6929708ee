"""Masks on a coarser grid as the official codes have them: a cell is its first pixel.

That is what torch's interpolation by "nearest" does, where nearest means upper left.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.outlines import Box, Combined, Mask, Outline
from hookctl.address.regions import Region


def first_pixels(region: Region, height: int, width: int, least: float = 0.5) -> Tensor:
    """Where the upper left corners of a grid's cells lie inside, bool [height, width].

    least: from which brightness on a pixel of a mask is inside. Of outlines that are neither boxes
    nor masks nor joined of them it is the cells' centres that count.
    """
    return _inside(region.outline, height, width, least)


def _inside(outline: Outline, height: int, width: int, least: float) -> Tensor:
    if isinstance(outline, Mask):
        values = torch.from_numpy(np.ascontiguousarray(outline.values))
        return F.interpolate(values[None, None], size=(height, width))[0, 0] >= least
    if isinstance(outline, Box):
        y, x = np.arange(height) / height, np.arange(width) / width
        rows = (y >= outline.y0) & (y < outline.y1)
        columns = (x >= outline.x0) & (x < outline.x1)
        return torch.from_numpy(np.outer(rows, columns))
    if isinstance(outline, Combined):
        if outline.operation == "not":
            return ~_inside(outline.parts[0], height, width, least)
        first, *others = (_inside(part, height, width, least) for part in outline.parts)
        for other in others:
            first = first & other if outline.operation == "and" else first | other
        return first
    return torch.from_numpy(outline.inside(height, width))
