"""What the `positions` hook is shown: the rotary positions of a denoiser call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import Rows
from hookctl.errors import InputError


@dataclass(eq=False)
class PositionsCall:
    """The rotary positions of one denoiser call, in float64; assign to change them.

    positions: of every token on every axis, [[rows,] tokens, axes]; a model that numbers images and
        text apart (FLUX.2) shows them one after the other.
    frequencies: by which a pair of channels rotates for a position, [pairs], in radians.
    amplitudes: what the pair is multiplied by, [pairs], 1.
    axes: their names: "row", "column", and "frame" of videos, "image" of images that are numbered,
        "text".
    axis: which of them a pair rotates by, [pairs].
    theta: whose powers the frequencies are; None where positions are fractions of a size (LTX).
    words: how many of the last tokens are of a text that goes on along all axes (Qwen-Image).
    rows: whose the batch rows are (`Rows`).
    clock: when (`Clock`).
    """

    positions: Tensor
    frequencies: Tensor
    amplitudes: Tensor
    axes: tuple[str, ...]
    axis: Tensor
    theta: float | None
    rows: Rows
    clock: Clock
    words: int = 0

    def pairs(self, axis: str) -> Tensor:
        """The pairs that rotate by an axis, as indices; InputError if there are none."""
        return (self.axis == self._index(axis)).nonzero()[:, 0]

    def extent(self, axis: str) -> float:
        """From the first to the last position of an axis, both counted; of images alone."""
        last = self.positions.shape[-2] - self.words
        values = self.positions[..., :last, self._index(axis)]
        return float(values.max() - values.min()) + 1 if values.numel() else 0.0

    def _index(self, axis: str) -> int:
        if axis not in self.axes:
            raise InputError(f"axis {axis!r}; these positions have {', '.join(self.axes)}")
        return self.axes.index(axis)
