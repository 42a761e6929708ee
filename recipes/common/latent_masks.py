"""Parts of the canvas in the form of a run's latents: grids, frames, or packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from hookctl.address.regions import Region
from hookctl.loop.packing import packed, unpacked
from hookctl.loop.state import State


def shape_of_latents(state: State) -> tuple[int, ...]:
    """The shape of one image's latents, as the scheduler has them."""
    sample = state.kwargs[state.sample]
    if not isinstance(sample, list):
        found, images = tuple(state.latents.shape[1:]), state.images_in_sequence
        if images is None or len(found) != 2:
            return found
        return (images.grids[images.target].tokens, found[1])  # behind it come reference images
    channels, *sides = sample[0].shape
    return (channels, *(sides[1:] if sides[0] == 1 else sides))  # Z-Image gives each image a frame


def cells_inside(region: Region, state: State) -> Tensor:
    """How much of each cell lies inside, float32, in the shape of one image's latents.

    Raises UnsupportedError where latents are packed in a way that is not known.
    """
    latents = torch.zeros(1, *shape_of_latents(state))
    cells = state.grid if len(state.grid) > 2 else (1, *state.grid)
    grid = unpacked(state.pipe, latents, cells)
    covered = region.coverage(*grid.shape[-2:])
    return packed(state.pipe, covered.expand(grid.shape))[0].contiguous()
