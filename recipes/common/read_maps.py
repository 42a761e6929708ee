"""Attention maps that a recipe reads out of the pipeline's own calls: sums by prompt and image."""

from __future__ import annotations

from torch import Tensor

from hookctl.address.rows import Row
from hookctl.address.sites import Grid


class MapSums:
    """Sums of maps over sites and steps, one for each image of each prompt."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def add(self, row: Row, image: Tensor) -> None:
        """Add a map, [..., height, width], of a row's prompt and image."""
        key = (row.prompt, row.image)
        self._sums[key] = self._sums[key] + image if key in self._sums else image
        self._counts[key] = self._counts.get(key, 0) + 1

    def sum(self, prompt: int, image: int) -> Tensor | None:
        """The sum of an image's maps; None before the first."""
        return self._sums.get((prompt, image))

    def means(self) -> list[Tensor]:
        """The mean of each image's maps, in the order in which they were first added."""
        return [total / self._counts[key] for key, total in self._sums.items()]

    def clear(self) -> None:
        self._sums, self._counts = {}, {}


def map_of(values: Tensor, grid: Grid) -> Tensor:
    """The map of a read-out [sub-batch, N, tokens], summed over tokens: [frames, height, width]."""
    return values.detach().sum(-1).reshape(-1, grid.height, grid.width)
