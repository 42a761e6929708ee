"""Latents that are packed into tokens, as a canvas of them, and a call that is shown a tile of it.

FLUX, FLUX.2 and Qwen-Image hand their model a sequence of tokens, and beside it where each stands:
of a tile it is told what it would be told of an image of the tile's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hookctl.loop.state import State
from hookctl.recipes.common.canvas.tiles import Tile

IDS, SHAPES = "img_ids", "img_shapes"


def is_packed(state: State) -> bool:
    """Whether a call's latents are the tokens of one image, whose places its arguments tell."""
    sample, images = state.kwargs[state.sample], state.images_in_sequence
    if not isinstance(sample, Tensor) or sample.dim() != 3 or images is None or images.references:
        return False
    told = isinstance(state.kwargs.get(IDS), Tensor) or bool(state.kwargs.get(SHAPES))
    return told and len(state.grid) == 2


def masks_the_whole(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has a mask of all tokens of its sequence, those of the canvas among them."""
    further = kwargs.get("joint_attention_kwargs") or {}
    return any(isinstance(given.get("attention_mask"), Tensor) for given in (kwargs, further))


def as_canvas(x: Tensor, height: int, width: int) -> Tensor:
    """Packed latents [images, tokens, channels] as [images, channels, height, width]."""
    return x.mT.unflatten(-1, (height, width))


def as_tokens(x: Tensor) -> Tensor:
    """[images, channels, height, width] as packed latents."""
    return x.flatten(-2).mT


def places(kwargs: Mapping[str, Any], tile: Tile) -> dict[str, Any]:
    """What tells the model where the tokens of a tile stand."""
    found: dict[str, Any] = {}
    ids = kwargs.get(IDS)
    if isinstance(ids, Tensor):
        grid = ids.unflatten(-2, (tile.canvas_height, tile.canvas_width))
        found[IDS] = grid[..., : tile.height, : tile.width, :].flatten(-3, -2)
    if kwargs.get(SHAPES):
        found[SHAPES] = [_shape(one, tile) for one in kwargs[SHAPES]]
    return found


def _shape(given: Any, tile: Tile) -> Any:
    """(frames, height, width) of a row's image, or a list of that one."""
    if isinstance(given, list):
        return [_shape(one, tile) for one in given]
    return (given[0], tile.height, tile.width)
