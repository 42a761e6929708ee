"""Images pasted on a canvas: as pixels, and as latents at any noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hookctl.address.regions import Region
from hookctl.arguments import refusal
from hookctl.bounds import SIDE
from hookctl.errors import InputError

GRAY = (128, 128, 128)


def resized(image: Any, size: tuple[int, int], name: str) -> Image.Image:
    """A PIL image at a size (width, height) in px; name: of the argument that holds the size."""
    if not all(1 <= side <= SIDE for side in size):
        raise refusal(name, size, f"a width and a height of 1 to {SIDE} px")
    return image.resize((int(size[0]), int(size[1])), Image.Resampling.LANCZOS)


class PastedImages:
    """Images of one size, each at the same place of a gray canvas of its own.

    who: the recipe, for errors. images: PIL; at: (x, y) of their upper left corner, size: (width,
    height) of the canvas, in px; factor: px per cell of the latent, of which sides and place are
    multiples. region: which part of the images counts. by_centre: a cell counts where its centre
    lies in the region, else where half of it is covered.

    Raises InputError for images of several sizes, or that do not fit on the canvas.
    """

    def __init__(
        self,
        who: str,
        images: Sequence[Any],
        *,
        at: tuple[int, int],
        size: tuple[int, int],
        factor: int,
        region: Region,
        by_centre: bool = False,
    ) -> None:
        sizes = {image.size if isinstance(image, Image.Image) else None for image in images}
        if len(sizes) != 1 or None in sizes:
            given = ", ".join("x".join(map(str, size)) if size else "none" for size in sizes)
            raise InputError(f"{who}: images of {given} px; give PIL images of one size")
        (width, height), (x, y) = images[0].size, at
        fits = 0 <= x and 0 <= y and x + width <= size[0] and y + height <= size[1]
        if not fits or any(side % factor for side in (x, y, width, height)):
            raise InputError(
                f"{who}: an image of {width} x {height} px at {at} on a canvas of {size[0]} x "
                f"{size[1]}; sides and place must be multiples of {factor} and lie inside"
            )
        self.images, self.at, self.size, self.region = list(images), (x, y), size, region
        self.cells = tuple(side // factor for side in (x, y, width, height))
        self._by_centre = by_centre

    def canvases(self) -> list[Image.Image]:
        """The images on their canvases."""
        found = []
        for image in self.images:
            inside = self.region.outline.inside(image.height, image.width)
            canvas = Image.new("RGB", self.size, GRAY)
            canvas.paste(image, self.at, Image.fromarray(inside.astype("uint8") * 255))
            found.append(canvas)
        return found

    def box(self) -> Region:
        """Where the images stand on the canvas, whatever counts of them."""
        (x, y), (width, height) = self.at, self.images[0].size
        columns, rows = self.size
        return Region.box(x / columns, y / rows, (x + width) / columns, (y + height) / rows)

    def mask(self, like: Tensor) -> Tensor:
        """Where the images count, 0 or 1, [1, 1, height, width] of the canvas's latents `like`."""
        x, y, width, height = self.cells
        if self._by_centre:
            inside = torch.from_numpy(self.region.outline.inside(height, width))
        else:
            inside = self.region.tokens(height, width).reshape(height, width)
        mask = like.new_zeros(1, 1, *like.shape[-2:])
        mask[..., y : y + height, x : x + width] = inside.to(like)
        return mask

    def in_place(self, latents: Tensor, like: Tensor) -> Tensor:
        """Latents of the images [images, channels, height, width] at their place on the canvas, in
        the shape of its latents `like`, 0 around."""
        x, y, width, height = self.cells
        canvas = torch.zeros_like(like)
        canvas[..., y : y + height, x : x + width] = latents.to(like)
        return canvas
