"""Boxes on a grid as the official codes have them: every edge moved to a border between cells."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hookctl.address.outlines import Box, Combined, Outline
from hookctl.address.regions import Region

Rounding = Callable[[float], int]  # an edge in cells -> which border: math.floor, or round


def box_cells(region: Region, height: int, width: int, edges: Rounding) -> Tensor:
    """Which cells of a grid are inside, bool [height, width]; none of a box that is too thin.

    Boxes and what is joined of them; of another outline, the cells that are half covered.
    """
    return _cells(region.outline, height, width, edges)


def _cells(outline: Outline, height: int, width: int, edges: Rounding) -> Tensor:
    if isinstance(outline, Box):
        inside = torch.zeros(height, width, dtype=torch.bool)
        left, right = edges(outline.x0 * width), edges(outline.x1 * width)
        inside[edges(outline.y0 * height) : edges(outline.y1 * height), left:right] = True
        return inside
    if isinstance(outline, Combined):
        first, *others = (_cells(part, height, width, edges) for part in outline.parts)
        for other in others:
            first = first & other if outline.operation == "and" else first | other
        return ~first if outline.operation == "not" else first
    return Region(outline).tokens(height, width).reshape(height, width)
