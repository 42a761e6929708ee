"""What the page shows as pictures: maps over what was drawn, boxes in their colours."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageOps
from PIL.Image import Resampling

from hookctl.app.stack import Box
from hookctl.inspect import show

if TYPE_CHECKING:
    from torch import Tensor

# Okabe and Ito's, which stay apart for people who see fewer colours; black is left out.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
SIDE = 512  # px, to which maps of small pictures are enlarged, so that lines on them are fine
BRIGHT = 0.02  # share of all cells of all maps that have the last colour


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture in the size (width, height) that the model draws."""
    return ImageOps.fit(image.convert("RGB"), size, Resampling.LANCZOS)


def data_url(image: Image.Image | None) -> str:
    """A picture as text, for a canvas; "" for none."""
    if image is None:
        return ""
    file = BytesIO()
    image.save(file, "PNG" if max(image.size) <= 512 else "JPEG")
    kind = "png" if max(image.size) <= 512 else "jpeg"
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def boxed(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The picture with the outlines of boxes, each in its colour."""
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    line = max(2, min(image.size) // 128)
    for n, box in enumerate(boxes):
        corners = [box.x0 * image.width, box.y0 * image.height]
        corners += [box.x1 * image.width - 1, box.y1 * image.height - 1]
        draw.rectangle(corners, outline="black", width=line + 2)
        draw.rectangle(corners, outline=COLOURS[n % len(COLOURS)], width=line)
    return image


def map_picture(
    image: Image.Image,
    maps: Mapping[str, Tensor],
    word: str,
    step: int | None,
    boxes: Sequence[Box] = (),
) -> Image.Image:
    """A word's map over the picture, all words and steps on one scale; step: None for their mean.

    maps: [steps, height, width] by word. The scale ends where the strongest `BRIGHT` begin: single
    cells that look at one word alone would leave everything else dark.
    """
    every = torch.stack([*maps.values()]).flatten()
    scale = 0.0, float(every.kthvalue(max(1, round((1 - BRIGHT) * len(every)))).values)
    map = maps[word].mean(0) if step is None else maps[word][step]
    return boxed(show.overlay(_enlarged(image), map, scale=scale), boxes)


def map_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in px of a picture's maps."""
    factor = max(1, SIDE // max(image.size))
    return image.width * factor, image.height * factor


def _enlarged(image: Image.Image) -> Image.Image:
    return image.resize(map_size(image), Resampling.LANCZOS)


def attended(
    maps: Mapping[str, Tensor], x: float, y: float, step: int | None
) -> list[tuple[str, float]]:
    """How much the place (x, y), from 0 to 1, attends to each word, most first."""
    found = []
    for word, by_step in maps.items():
        height, width = by_step.shape[1:]
        row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
        values = by_step[:, row, column]
        found.append((word, float(values.mean() if step is None else values[step])))
    return sorted(found, key=lambda pair: -pair[1])


def bars(pairs: Sequence[tuple[str, float]], x: float, y: float) -> str:
    """HTML: a bar for each word."""
    most = max((value for _, value in pairs), default=0.0) or 1.0
    rows = "".join(
        f"<tr><th>{escape(word)}</th><td><div style='width:{100 * value / most:.1f}%'></div></td>"
        f"<td class='share'>{value:.1%}</td></tr>"
        for word, value in pairs
    )
    place = f"{x:.0%} to the right, {y:.0%} down"
    return f"<p>This place ({place}) looks at</p><table class='bars'>{rows}</table>"
