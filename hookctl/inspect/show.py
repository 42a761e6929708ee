"""Pictures and tables: heat maps, overlays, before/after grids, one word over the steps.

Only draws: it knows maps, images and strings. Small images are enlarged so that they and their
text can be read: photographs smoothly (Lanczos), heat maps by whole cells, since a map is a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.Image import Resampling
from torch import Tensor

from hookctl.errors import InputError
from hookctl.inspect.tables import markdown_table, table

__all__ = [
    "contact_sheet", "grid", "heatmap", "markdown_table", "overlay", "table", "time_strip",
]  # fmt: skip

Array: TypeAlias = np.ndarray[Any, Any]
Picture: TypeAlias = Image.Image
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

SMALL = 256  # px; shorter sides below this are enlarged
INK = (32, 33, 36)
PAPER = (240, 240, 240)

# inferno: perceptually even, readable in grey and by the colour-blind; nine anchors of RGB
INFERNO = np.array(
    [
        (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51),
        (249, 142, 9), (249, 201, 50), (252, 255, 164),
    ]
)  # fmt: skip


def heatmap(
    map: Tensor,
    size: tuple[int, int] | None = None,
    normalise: bool = True,
    *,
    smooth: bool = False,
) -> Picture:
    """A map in colour, black to red to pale yellow.

    Receives: a map [h, w], any float type; the size of the image (width, height) in px, or
    None for about 256; whether the least value becomes 0 and the greatest 1 (otherwise values are
    cut to 0 to 1); whether cells blend into each other. Returns: an RGB image.
    """
    values = _values(map)
    if normalise:
        values = _normalised(values, values.min(), values.max())
    if size is None:
        scale = max(1, round(SMALL / max(values.shape)))
        size = (values.shape[1] * scale, values.shape[0] * scale)
    return _coloured(_resized(values, size, smooth))


def overlay(
    image: Picture,
    map: Tensor,
    alpha: float = 0.55,
    label: str | None = None,
    *,
    normalise: bool = True,
) -> Picture:
    """A map over its image, faded; where the map is low, more of it shows.

    Receives: an image, enlarged if its shorter side is below 256 px; a map [h, w]; the strength
    of the colour, 0 to 1; a word for the corner; `normalise` as for `heatmap`. Returns: RGB.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: {alpha!r} given; a number from 0 to 1 expected")
    image = _enlarged(image)
    values = _values(map)
    if normalise:
        values = _normalised(values, values.min(), values.max())
    values = _resized(values, image.size, smooth=True)
    weight = (alpha * (0.7 + 0.6 * values)).clip(0, 1)[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    photo = np.asarray(image) * (1 - alpha) + grey * alpha  # its colours must not pass for heat
    mixed = photo * (1 - weight) + np.asarray(_coloured(values)) * weight
    result = Image.fromarray(mixed.round().astype(np.uint8))
    if label:
        _tag(result, label)
    return result


def grid(
    rows: Sequence[Sequence[Picture | None]],
    column_titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    cell: tuple[int, int] | None = None,
    pad: int = 8,
    background: str = "white",
) -> Picture:
    """Pictures in rows, with titles above the columns and to the left of the rows.

    Receives: rows of equal length, None for an empty place; titles, wrapped to their place; the
    size of a cell (width, height) in px, or None for the largest image's, at least 256 px on
    the shorter side; the gap between cells in px. Pictures keep their proportions.
    """
    columns = len(rows[0]) if rows else 0
    if not columns or any(len(row) != columns for row in rows):
        lengths = [len(row) for row in rows]
        raise InputError(f"rows: lengths {lengths} given; equal lengths above 0 expected")
    for titles, want, name in (
        (column_titles, columns, "column_titles"),
        (row_titles, len(rows), "row_titles"),
    ):
        if titles is not None and len(titles) != want:
            raise InputError(f"{name}: {len(titles)} given; {want} expected")
    width, height = cell or _largest([image for row in rows for image in row if image])
    font = _font(max(13, min(width, height) // 14))
    above = [_wrap(title, width, font) for title in column_titles or []]
    beside = [_wrap(title, max(width // 2, 90), font) for title in row_titles or []]
    top = pad + (max(_extent(t, font)[1] for t in above) + pad if above else 0)
    left = pad + (max(_extent(t, font)[0] for t in beside) + 2 * pad if beside else 0)

    size = (left + columns * (width + pad), top + len(rows) * (height + pad))
    sheet = Image.new("RGB", size, background)
    draw = ImageDraw.Draw(sheet)
    ink = INK if sum(ImageColor.getrgb(background)[:3]) > 382 else PAPER
    for c, title in enumerate(above):
        x = left + c * (width + pad) + width // 2
        draw.multiline_text((x, top - pad), title, ink, font, "md", align="center")
    for r, row in enumerate(rows):
        y = top + r * (height + pad)
        if beside:
            at = (left - pad, y + height // 2)
            draw.multiline_text(at, beside[r], ink, font, "rm", align="right")
        for c, image in enumerate(row):
            x = left + c * (width + pad)
            if image is not None:
                fitted = _fitted(image, (width, height))
                at = (x + (width - fitted.width) // 2, y + (height - fitted.height) // 2)
                sheet.paste(fitted, at)
    return sheet


def contact_sheet(
    images: Sequence[Picture],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    cell: tuple[int, int] | None = None,
) -> Picture:
    """Pictures in reading order in a nearly square grid, each with its label in the corner."""
    if not images:
        raise InputError("images: none given; at least one expected")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"labels: {len(labels)} given; {len(images)} expected")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    cell = cell or _largest(images)
    places: list[Picture | None] = []
    for i, image in enumerate(images):
        fitted = _fitted(image, cell)
        if labels:
            _tag(fitted, labels[i])
        places.append(fitted)
    places += [None] * (-len(images) % columns)
    return grid([places[i : i + columns] for i in range(0, len(places), columns)], cell=cell)


def time_strip(
    maps: Sequence[Tensor],
    labels: Sequence[str],
    image: Picture | None = None,
    *,
    cell: tuple[int, int] | None = None,
) -> Picture:
    """One word over the steps: its maps side by side, all on one colour scale.

    Receives: maps [h, w], one per step; a label for each; the image to lay them over, if any.
    """
    if not maps or len(maps) != len(labels):
        given = f"{len(maps)} maps, {len(labels)} labels"
        raise InputError(f"labels: {given} given; one label per map and a map or more expected")
    arrays = [_values(map) for map in maps]
    low, high = min(a.min() for a in arrays), max(a.max() for a in arrays)
    tensors = [torch.from_numpy(_normalised(a, low, high)) for a in arrays]
    if image is None:
        images = [heatmap(t, cell, normalise=False) for t in tensors]
    else:
        images = [overlay(image, t, normalise=False) for t in tensors]
    return grid([images], column_titles=labels, cell=cell)


def _values(map: Tensor) -> Array:
    if not isinstance(map, Tensor) or map.ndim != 2 or not map.numel():
        given = f"shape {list(map.shape)}" if isinstance(map, Tensor) else type(map).__name__
        raise InputError(f"map: {given} given; a tensor [h, w] expected")
    values: Array = map.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise InputError("map: NaN or infinite values given; finite ones expected")
    return values


def _normalised(values: Array, low: float, high: float) -> Array:
    """From low to high to 0 to 1; a flat map is 0."""
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _resized(values: Array, size: tuple[int, int], smooth: bool) -> Array:
    """Values [h, w] to [height, width], cut to 0 to 1."""
    image = Image.fromarray(values.astype(np.float32))
    resized = image.resize(size, Resampling.BICUBIC if smooth else Resampling.NEAREST)
    return np.asarray(resized, dtype=np.float64).clip(0, 1)


def _coloured(values: Array) -> Picture:
    """Values [height, width], 0 to 1, as RGB."""
    anchors = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(values, anchors, channel) for channel in INFERNO.T]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def _enlarged(image: Picture) -> Picture:
    """RGB, enlarged by a whole factor if small."""
    factor = math.ceil(SMALL / min(image.size))
    rgb = image.convert("RGB")
    return rgb.resize((rgb.width * factor, rgb.height * factor), Resampling.LANCZOS)


def _largest(images: Sequence[Picture]) -> tuple[int, int]:
    """A cell into which the largest image fits, not small."""
    if not images:
        return SMALL, SMALL
    width, height = max(i.width for i in images), max(i.height for i in images)
    factor = max(1, math.ceil(SMALL / min(width, height)))
    return width * factor, height * factor


def _fitted(image: Picture, cell: tuple[int, int]) -> Picture:
    """An RGB copy as large as fits into a cell."""
    scale = min(cell[0] / image.width, cell[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Resampling.LANCZOS)


def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)


def _extent(text: str, font: Font) -> tuple[int, int]:
    """The width and height of a text of one or more lines, in px."""
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font, "la")
    return math.ceil(box[2]), math.ceil(box[3])


def _wrap(text: str, width: int, font: Font) -> str:
    """The text with line breaks between words, so that lines fit where words do."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _tag(image: Picture, text: str) -> None:
    """Draw a word on a dark plate into the lower left corner."""
    size = max(12, min(image.size) // 16)
    font, margin = _font(size), size // 2
    text = _wrap(text, image.width - 4 * margin, font)
    width, height = _extent(text, font)
    top, bottom = image.height - height - 3 * margin, image.height - margin
    draw = ImageDraw.Draw(image, "RGBA")
    draw.rounded_rectangle((margin, top, 3 * margin + width, bottom), margin, (0, 0, 0, 170))
    draw.multiline_text((2 * margin, (top + bottom) / 2), text, "white", font, "lm")
