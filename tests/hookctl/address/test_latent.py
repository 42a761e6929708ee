"""Axes of latents: where frames, channels and places stand in those of each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookctl
from hookctl import Editor
from hookctl.address.latent import over_latent
from tests.zoo.wild import WILD


class Sides(Editor):
    """What the first denoiser call is given and is known to be."""

    def before(self, state: Any) -> None:
        self.shape = tuple(state.kwargs[state.sample].shape)
        self.grid, self.channels = state.grid, state.denoiser.config.in_channels


@pytest.mark.parametrize(
    ("name", "axes"),
    [("LattePipeline", "bcfhw"), ("AnyFlowPipeline", "bfchw"), ("CogVideoXPipeline", "bfchw")],
)
def test_axes_are_those_that_models_take(name: str, axes: str) -> None:
    pipe, seen = WILD[name].make(), Sides()
    with hookctl.control(pipe, seen):
        WILD[name].draw(pipe, ["a red cat"], ["blurry"], [0])
    sides = dict(zip(axes, seen.shape, strict=True))
    assert sides["c"] == seen.channels
    assert seen.grid == (sides["f"], sides["h"], sides["w"])


@pytest.mark.parametrize("axes", ["bcfhw", "bfchw", "bfhwc"])
def test_masks_over_videos_of_as_many_frames_as_channels(axes: str) -> None:
    mask = torch.zeros(3, 3, 3, dtype=torch.bool)
    mask[1, 0, 2] = True  # of the second frame
    latent = torch.zeros(3, 3, 3, 3)
    shaped = over_latent(mask, latent, axes).expand_as(latent)
    channels_first = shaped.movedim(axes.index("c") - 1, 0)
    assert all(torch.equal(one, mask) for one in channels_first)


class Grids(Editor):
    """By resolution, how many tokens high a site's grid is over the latent."""

    def __init__(self) -> None:
        self.found: set[tuple[Any, int, int]] = set()

    def attention(self, call: Any) -> None:
        if call.grid is not None:
            self.found.add((call.site.resolution, call.grid.height, call.latent[-2]))


@pytest.mark.parametrize(
    "name", ["StableCascadePriorPipeline", "QwenImagePipeline", "FluxPipeline", "WanPipeline"]
)
def test_resolutions_are_of_the_latent(name: str) -> None:
    """Not every block of Stable Cascade's halves; sides of packed latents are of tokens."""
    pipe, seen = WILD[name].make(), Grids()
    with hookctl.control(pipe, seen):
        WILD[name].draw(pipe, ["a red cat"], ["blurry"], [0])
    assert seen.found and all(r * side == height for r, height, side in seen.found)
