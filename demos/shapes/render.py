"""Renders scenes in batches, on any device, from a table of anti-aliased stamps.

Stamps are exact signed-distance coverage with 1 px anti-aliasing. As objects do not overlap and
centres are whole pixels, an image is its background plus one difference per object, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .world import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    COLOUR_NAMES,
    COLOURS,
    IMAGE_SIZE,
    SHADE,
    SHAPES,
    SIZE_NAMES,
    STAMP,
    STRIPE,
    Scene,
    stamp,
)  # fmt: skip

MARGIN = STAMP // 2  # px that a stamp may stick out of the image
SIDE = IMAGE_SIZE + 2 * MARGIN


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Stamps [shape * size, 64 * 64], colours [colour, 3], backgrounds [background, 3], all 0
    to 1."""
    stamps = np.stack([stamp(shape, size) for shape in SHAPES for size in SIZE_NAMES])
    return (
        torch.from_numpy(stamps).flatten(1).to(device),
        torch.tensor(list(COLOURS.values()), device=device) / 255.0,
        torch.tensor(list(BACKGROUNDS.values()), device=device) / 255.0,
    )


def scene_table(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Scenes as numbers: things int64 [n, 6] (image, stamp, colour, striped, x, y) and the
    index of the background, int64 [batch]."""
    rows = [
        (
            i, SHAPES.index(t.shape) * len(SIZE_NAMES) + SIZE_NAMES.index(t.size),
            COLOUR_NAMES.index(t.colour), int(t.pattern == "striped"), *t.centre,
        )
        for i, scene in enumerate(scenes)
        for t in scene.things
    ]  # fmt: skip
    backgrounds = [BACKGROUND_NAMES.index(scene.background) for scene in scenes]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 6), torch.tensor(backgrounds)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images [batch, 3, h, w] in -1 to 1 -> uint8 [batch, h, w, 3]."""
    values = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return np.asarray(values.permute(0, 2, 3, 1).cpu().numpy())


def drawn(scenes: Sequence[Scene]) -> list[Image.Image]:
    """Scenes as images, RGB."""
    return [Image.fromarray(pixels) for pixels in to_uint8(render(scenes))]


def render(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Draw scenes.

    Receives: the scenes, all centres inside the image. Returns: float32 [batch, 3, 128, 128],
    RGB from -1 to 1.
    """
    device = torch.device(device)
    stamps, colours, backgrounds = _tables(device)
    table, background_index = (t.to(device, non_blocking=True) for t in scene_table(scenes))
    image, which, colour, striped, x, y = table.unbind(1)
    background = backgrounds[background_index] * 2.0 - 1.0  # [batch, 3]

    step = torch.arange(STAMP, device=device)
    dark = ((y[:, None] - MARGIN + step) // STRIPE % 2) * striped[:, None]  # [n, 64]
    shade = 2.0 - 2.0 * (1.0 - SHADE) * dark
    paint = colours[colour][:, :, None] * shade[:, None] - 1.0 - background[image][:, :, None]
    change = stamps[which].view(-1, 1, STAMP, STAMP) * paint[..., None]  # [n, 3, 64, 64]

    if device.type == "cpu":  # a few slices beat a scatter of single pixels
        canvas = background[:, :, None, None].repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)
        for (i, _, _, _, cx, cy), d in zip(table.tolist(), change, strict=True):
            left, top = cx - MARGIN, cy - MARGIN
            x0, x1, y0, y1 = max(left, 0), left + STAMP, max(top, 0), top + STAMP
            part = d[:, y0 - top : IMAGE_SIZE - top, x0 - left : IMAGE_SIZE - left]
            canvas[i, :, y0:y1, x0:x1] += part
        return canvas
    canvas = background[:, :, None].repeat(1, 1, SIDE * SIDE)  # padded by the margin
    corner = image * 3 * SIDE * SIDE + y * SIDE + x  # of each stamp on the padded canvas
    plane = torch.arange(3, device=device)[:, None, None] * SIDE * SIDE
    inside = (plane + step[:, None] * SIDE + step).flatten()  # [3 * 64 * 64]
    canvas.view(-1).index_add_(0, (corner[:, None] + inside).flatten(), change.flatten())
    canvas = canvas.view(-1, 3, SIDE, SIDE)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    return canvas.contiguous()
