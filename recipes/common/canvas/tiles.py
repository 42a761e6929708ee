"""Tiles of a canvas: overlapping parts that together cover all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.errors import InputError


@dataclass(frozen=True)
class Tile:
    """A part of a canvas [..., canvas_height, canvas_width].

    top, left, height, width: in cells; the columns of a tile may go round the canvas's right side.
    """

    top: int
    left: int
    height: int
    width: int
    canvas_height: int
    canvas_width: int

    @property
    def is_canvas(self) -> bool:
        """Whether the tile is the whole canvas."""
        own = self.top, self.left, self.height, self.width
        return own == (0, 0, self.canvas_height, self.canvas_width)

    def cut(self, x: Tensor) -> Tensor:
        """The tile's part of x, [..., height, width]."""
        rows = x[..., self.top : self.top + self.height, :]
        if self.left + self.width <= self.canvas_width:
            return rows[..., self.left : self.left + self.width]
        return rows.index_select(-1, self._columns(x))

    def add(self, part: Tensor, total: Tensor) -> None:
        """Add a part [..., height, width] to its place in `total`, a tensor of the canvas."""
        rows = total[..., self.top : self.top + self.height, :]
        rows.index_add_(-1, self._columns(total), part.to(total))

    def _columns(self, like: Tensor) -> Tensor:
        columns = torch.arange(self.left, self.left + self.width, device=like.device)
        return columns % self.canvas_width


def tiles_of(
    height: int,
    width: int,
    size: tuple[int, int],
    stride: tuple[int, int] | None = None,
    *,
    wrap: bool = False,
) -> list[Tile]:
    """Tiles of a size that cover a canvas of height x width cells, row by row.

    size: (height, width) of a tile; a canvas that is smaller is one tile. stride: cells from tile
    to tile, (down, right), an eighth of the size if None; where it does not meet the canvas's side,
    a last tile ends there. wrap: tiles go round the sides of a canvas that is wider than a tile.

    Raises InputError for a stride that would leave cells in no tile.
    """
    strides = stride or (max(1, size[0] // 8), max(1, size[1] // 8))
    for step, length, name in zip(strides, size, ("rows", "columns"), strict=True):
        if step > length:
            raise InputError(
                f"stride: {step} {name} from tile to tile, but a tile has {length}, so some would "
                "be in none; give a smaller stride"
            )
    size = min(size[0], height), min(size[1], width)
    lefts = _starts(width, size[1], strides[1])
    if wrap and size[1] < width:
        lefts = list(range(0, width, strides[1]))
    return [
        Tile(top, left, *size, height, width)
        for top in _starts(height, size[0], strides[0])
        for left in lefts
    ]


def _starts(length: int, size: int, stride: int) -> list[int]:
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] + size == length else [*starts, length - size]
