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
from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes.common.real_images.encoded import takes_videos

GRAY = (128, 128, 128)


def resized(image: Any, size: tuple[int, int], name: str) -> Image.Image:
    """A PIL image at a size (width, height) in px; name: of the argument that holds the size."""
    if not all(1 <= side <= SIDE for side in size):
        raise refusal(name, size, f"a width and a height of 1 to {SIDE} px")
    return image.resize((int(size[0]), int(size[1])), Image.Resampling.LANCZOS)


def require_grid(pipe: Any, who: str) -> None:
    """Raise UnsupportedError unless a pipeline's latents are images with rows and columns."""
    if hasattr(pipe, "_pack_latents") or takes_videos(pipe):
        raise UnsupportedError(
            f"{who} writes images into places of latents [images, channels, height, width], and "
            f"those of {type(pipe).__name__} are packed, or videos; use a UNet pipeline, or "
            "DifferentialDiffusion, which keeps places of any latents"
        )


class PastedImages:
    """Images of one size, each at the same place of a gray canvas of its own.

    who: the recipe, for errors. images: PIL; at: (x, y) of their upper left corner, size: (width,
    height) of the canvas, in px; factor: px per cell of the latent, of which sides and place are
    multiples. region: which part of the images counts. official: as the official code of Cyclic
    One-Way has it: the images themselves are gray outside the region, and a cell counts where its
    first pixel is in the region; else they are whole, and a cell counts where half of it is
    covered.

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
        official: bool = False,
    ) -> None:
        sizes = {image.size if isinstance(image, Image.Image) else None for image in images}
        if len(sizes) != 1 or None in sizes:
            given = ", ".join("x".join(map(str, size)) if size else "none" for size in sizes)
            raise InputError(f"{who}: images of {given} px; give PIL images of one size")
        if not all(1 <= side <= SIDE for side in size):
            raise refusal(f"{who}: size", size, f"a width and a height of 1 to {SIDE} px")
        (width, height), (x, y) = images[0].size, at
        fits = 0 <= x and 0 <= y and x + width <= size[0] and y + height <= size[1]
        if not fits or any(side % factor for side in (x, y, width, height)):
            raise InputError(
                f"{who}: an image of {width} x {height} px at {at} on a canvas of {size[0]} x "
                f"{size[1]}; sides and place must be multiples of {factor} and lie inside"
            )
        self.at, self.size, self.region = (x, y), size, region
        self.cells = tuple(side // factor for side in (x, y, width, height))
        self._official = official
        self._inside = region.outline.inside(height, width)  # of the pixels
        self.images = [self._on_gray(one, (width, height)) if official else one for one in images]

    def canvases(self) -> list[Image.Image]:
        """The images on their canvases."""
        return [self._on_gray(image, self.size, self.at) for image in self.images]

    def _on_gray(
        self, image: Image.Image, size: tuple[int, int], at: tuple[int, int] = (0, 0)
    ) -> Image.Image:
        canvas = Image.new("RGB", size, GRAY)
        canvas.paste(image, at, Image.fromarray(self._inside.astype("uint8") * 255))
        return canvas

    def box(self) -> Region:
        """Where the images stand on the canvas, whatever counts of them."""
        (x, y), (width, height) = self.at, self.images[0].size
        columns, rows = self.size
        return Region.box(x / columns, y / rows, (x + width) / columns, (y + height) / rows)

    def mask(self, like: Tensor) -> Tensor:
        """Where the images count, 0 or 1, [1, 1, height, width] of the canvas's latents `like`."""
        x, y, width, height = self.cells
        if self._official:
            pixels = torch.from_numpy(self._inside)
            inside = pixels[:: pixels.shape[0] // height, :: pixels.shape[1] // width]
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
