"""Renders scenes in batches, on any device, from a table of anti-aliased stamps.

Stamps are exact signed-distance coverage with 1 px anti-aliasing. As objects do not overlap and
centres are whole pixels, a picture is its ground plus one difference per object, in any order.
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
    COLOUR_NAMES,
    COLOURS,
    GROUND_NAMES,
    GROUNDS,
    PICTURE,
    SHADE,
    SHAPES,
    SIZE_NAMES,
    STAMP,
    STRIPE,
    Scene,
    stamp,
)  # fmt: skip

MARGIN = STAMP // 2  # px that a stamp may stick out of the picture
SIDE = PICTURE + 2 * MARGIN


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Stamps [shape * size, 64 * 64], colours [colour, 3], grounds [ground, 3], all 0 to 1."""
    stamps = np.stack([stamp(shape, size) for shape in SHAPES for size in SIZE_NAMES])
    return (
        torch.from_numpy(stamps).flatten(1).to(device),
        torch.tensor(list(COLOURS.values()), device=device) / 255.0,
        torch.tensor(list(GROUNDS.values()), device=device) / 255.0,
    )


def scene_table(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Scenes as numbers: things int64 [n, 6] (picture, stamp, colour, striped, x, y) and the
    index of the ground, int64 [batch]."""
    rows = [
        (
            i, SHAPES.index(t.shape) * len(SIZE_NAMES) + SIZE_NAMES.index(t.size),
            COLOUR_NAMES.index(t.colour), int(t.pattern == "striped"), *t.centre,
        )
        for i, scene in enumerate(scenes)
        for t in scene.things
    ]  # fmt: skip
    grounds = [GROUND_NAMES.index(scene.ground) for scene in scenes]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 6), torch.tensor(grounds)


def to_uint8(pictures: Tensor) -> NDArray[np.uint8]:
    """Pictures [batch, 3, h, w] in -1 to 1 -> uint8 [batch, h, w, 3]."""
    values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()
    return np.asarray(values.permute(0, 2, 3, 1).cpu().numpy())


def drawn(scenes: Sequence[Scene]) -> list[Image.Image]:
    """Scenes as pictures, RGB."""
    return [Image.fromarray(pixels) for pixels in to_uint8(render(scenes))]


def render(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Draw scenes.

    Receives: the scenes, all centres inside the picture. Returns: float32 [batch, 3, 128, 128],
    RGB from -1 to 1.
    """
    device = torch.device(device)
    stamps, colours, grounds = _tables(device)
    table, ground_index = (t.to(device, non_blocking=True) for t in scene_table(scenes))
    picture, which, colour, striped, x, y = table.unbind(1)
    ground = grounds[ground_index] * 2.0 - 1.0  # [batch, 3]

    step = torch.arange(STAMP, device=device)
    dark = ((y[:, None] - MARGIN + step) // STRIPE % 2) * striped[:, None]  # [n, 64]
    shade = 2.0 - 2.0 * (1.0 - SHADE) * dark
    paint = colours[colour][:, :, None] * shade[:, None] - 1.0 - ground[picture][:, :, None]
    change = stamps[which].view(-1, 1, STAMP, STAMP) * paint[..., None]  # [n, 3, 64, 64]

    if device.type == "cpu":  # a few slices beat a scatter of single pixels
        canvas = ground[:, :, None, None].repeat(1, 1, PICTURE, PICTURE)
        for (i, _, _, _, cx, cy), d in zip(table.tolist(), change, strict=True):
            left, top = cx - MARGIN, cy - MARGIN
            x0, x1, y0, y1 = max(left, 0), left + STAMP, max(top, 0), top + STAMP
            part = d[:, y0 - top : PICTURE - top, x0 - left : PICTURE - left]
            canvas[i, :, y0:y1, x0:x1] += part
        return canvas
    canvas = ground[:, :, None].repeat(1, 1, SIDE * SIDE)  # padded by the margin
    corner = picture * 3 * SIDE * SIDE + y * SIDE + x  # of each stamp on the padded canvas
    plane = torch.arange(3, device=device)[:, None, None] * SIDE * SIDE
    inside = (plane + step[:, None] * SIDE + step).flatten()  # [3 * 64 * 64]
    canvas.view(-1).index_add_(0, (corner[:, None] + inside).flatten(), change.flatten())
    canvas = canvas.view(-1, 3, SIDE, SIDE)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    return canvas.contiguous()
