"""Which tokens a linear layer is given: of images, of the text, or of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hookctl.address.sites import Grid
from hookctl.loop.inserting import LinearCall

# Layers whose input is the text's own stream.
_OF_TEXT = re.compile(r"(^|\.)(add_[qkv]_proj|to_add_out|ff_context|txt_\w+|context_\w+|cap_\w+)\b")

# Where images begin, the grid of each, and which of them is drawn.
Images = tuple[int, tuple[Grid, ...], int]


def token_spans(call: LinearCall, joint: str | None) -> tuple[Images | None, int | None]:
    """Where the images begin among a layer's tokens, with their grids and which is drawn, and where
    the text begins; None for what is not among them.

    joint: the order of a model that holds both in one sequence, "image_text" or "text_image".
    """
    n, images, text = call.input.shape[-2], call.images, call.text
    if joint is None:
        if text == n and _OF_TEXT.search(call.name):
            return None, 0
        return (None if call.grid is None else (0, (call.grid,), 0)), None
    if images is None or text is None:
        return None, None
    found = (images.grids, images.target)
    if n == text and (n != images.count or _OF_TEXT.search(call.name)):
        return None, 0
    if n == images.count:
        return (0, *found), None
    if n < images.count + text:
        return None, None
    return ((0, *found), n - text) if joint == "image_text" else ((n - images.count, *found), 0)


def over_images(
    tokens: int,
    images: Images,
    of_drawn: Callable[[Grid], Tensor] | None,
    references: Sequence[int],
) -> Tensor:
    """Weights of a layer's tokens, [tokens]: `of_drawn` of the image that is drawn, 1 in these
    references, else 0."""
    start, grids, target = images
    weights = torch.zeros(tokens)
    for i, grid in enumerate(grids):
        span = slice(start, start + grid.tokens)
        start += grid.tokens
        if i == target and of_drawn is not None:
            weights[span] = of_drawn(grid).flatten()
        elif i != target and i - (i > target) in references:
            weights[span] = 1
    return weights
