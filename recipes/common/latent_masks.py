"""Parts of the canvas in the form of a run's latents: grids, frames, or packed tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hookctl.address.latent import latent_axes
from hookctl.address.regions import Region
from hookctl.loop.packing import packed, unpacked
from hookctl.loop.state import State


def cells_inside(region: Region, state: State) -> Tensor:
    """How much of each cell lies inside, float32, in the shape of one image's latents.

    Raises UnsupportedError where latents are packed in a way that is not known.
    """
    latents = torch.zeros(1, *state.latents.shape[1:])
    cells = state.grid if len(state.grid) > 2 else (1, *state.grid)
    grid = unpacked(state.pipe, latents, cells)
    covered = region.coverage(*grid.shape[-2:])
    return packed(state.pipe, covered.expand(grid.shape))[0].contiguous()


def as_grid(x: Tensor, state: State) -> Tensor:
    """What has a number for each latent as [images, channels, [frames,] height, width]; what has
    no places as it is."""
    if x.dim() in (4, 5):
        return x.movedim(latent_axes(state.denoiser, x.dim()).index("c"), 1)
    images = state.images_in_sequence
    at = None if images is None else images.grids[images.target]
    cells = state.grid if at is None else (at.frames, at.height, at.width)
    if x.dim() == 3 and cells and math.prod(cells) == x.shape[1]:
        return unpacked(state.pipe, x, cells)
    return x


def of_grid(x: Tensor, state: State, dims: int) -> Tensor:
    """The inverse of `as_grid`; dims: how many the latents have."""
    if dims == 3:
        return packed(state.pipe, x)
    return x.movedim(1, latent_axes(state.denoiser, dims).index("c"))
