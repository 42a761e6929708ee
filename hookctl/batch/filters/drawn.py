"""What one draw made: two images from one noise, and the places that may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

THRESHOLD = 0.3  # of a map's maximum, from which on a place is the word's


@dataclass(frozen=True, eq=False)
class Drawn:
    """A pair of images.

    prompts, images: of the source and of its edit; maps: for both, by each word whose places may
    change, its mean map [h, w] (shares of attention); columns: what else the pair's row
    says; seed: of the noise.
    """

    prompts: tuple[str, str]
    images: tuple[Image, Image]
    maps: tuple[Mapping[str, Array], Mapping[str, Array]] = ({}, {})
    columns: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def source(self) -> Image:
        return self.images[0]

    @property
    def edited(self) -> Image:
        return self.images[1]

    @cached_property
    def masks(self) -> tuple[Mask | None, Mask | None]:
        """Where these words of either prompt are, [height, width]; None if it has none."""
        source, edited = (
            _mask(maps, image.size) for maps, image in zip(self.maps, self.images, strict=True)
        )
        return source, edited

    @cached_property
    def mask(self) -> Mask | None:
        """Where the images may differ: the places of either; None if no word has a map."""
        found = [mask for mask in self.masks if mask is not None]
        return np.logical_or.reduce(found) if found else None


def _mask(maps: Mapping[str, Array], size: tuple[int, int]) -> Mask | None:
    """size: (width, height) in px."""
    from PIL import Image

    found = []
    for map in maps.values():
        scaled = Image.fromarray(map.astype(np.float32) / max(float(map.max()), 1e-12))
        found.append(np.asarray(scaled.resize(size, Image.Resampling.BILINEAR)) >= THRESHOLD)
    return np.logical_or.reduce(found) if found else None
