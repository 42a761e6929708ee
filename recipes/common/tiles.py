"""Windows over a canvas: overlapping parts that together cover all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.errors import InputError


@dataclass(frozen=True)
class Window:
    """A part of a canvas [..., canvas_height, canvas_width]; its columns may go round the edge."""

    top: int
    left: int
    height: int
    width: int
    canvas_height: int
    canvas_width: int

    @property
    def whole(self) -> bool:
        """Whether the window is the canvas itself."""
        return (self.top, self.left, self.height, self.width) == (
            0,
            0,
            self.canvas_height,
            self.canvas_width,
        )

    def cut(self, x: Tensor) -> Tensor:
        """The window's part of x, [..., height, width]."""
        rows = x[..., self.top : self.top + self.height, :]
        if self.left + self.width <= self.canvas_width:
            return rows[..., self.left : self.left + self.width]
        return rows.index_select(-1, self._columns(x))

    def add(self, part: Tensor, total: Tensor) -> None:
        """Add a part [..., height, width] to its place in `total`."""
        rows = total[..., self.top : self.top + self.height, :]
        rows.index_add_(-1, self._columns(total), part.to(total))

    def _columns(self, like: Tensor) -> Tensor:
        columns = torch.arange(self.left, self.left + self.width, device=like.device)
        return columns % self.canvas_width


def windows_of(
    height: int,
    width: int,
    size: tuple[int, int],
    stride: tuple[int, int] | None = None,
    *,
    wrap: bool = False,
) -> list[Window]:
    """Windows of a size that cover a canvas, row by row.

    stride: between windows, an eighth of the size if None; where it does not meet the rim, a last
    window ends there. A canvas smaller than the size is one window. wrap: windows go round the
    sides, where the canvas is wider than the size.
    """
    steps = stride or (max(1, size[0] // 8), max(1, size[1] // 8))
    for step, length, name in zip(steps, size, ("rows", "columns"), strict=True):
        if step > length:
            raise InputError(
                f"stride: {step} {name} from window to window, but a window has {length}, so some "
                "would be in none; give a smaller stride"
            )
    size = min(size[0], height), min(size[1], width)
    lefts = _starts(width, size[1], steps[1])
    if wrap and size[1] < width:
        lefts = list(range(0, width, steps[1]))
    return [
        Window(top, left, *size, height, width)
        for top in _starts(height, size[0], steps[0])
        for left in lefts
    ]


def _starts(length: int, size: int, step: int) -> list[int]:
    starts = list(range(0, length - size + 1, step))
    return starts if starts[-1] + size == length else [*starts, length - size]
