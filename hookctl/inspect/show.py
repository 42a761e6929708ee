"""Pictures and tables: heat maps, overlays, before/after grids, one word over the steps.

Only draws: it knows maps, images and strings. Small images are enlarged so that they and their
text can be read: photographs smoothly (Lanczos), heat maps by whole cells, since a map is a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

from hookctl.errors import InputError
from hookctl.inspect.colours import (
    Array,
    Picture,
    Scale,
    colour_bar,
    coloured,
    edge_of,
    normalised,
    resized,
    scale_of,
    values_of,
)
from hookctl.inspect.lettering import tag
from hookctl.inspect.sheets import SMALL, abreast, contact_sheet, grid, stacked
from hookctl.inspect.tables import markdown_table, table

__all__ = [
    "colour_bar", "contact_sheet", "grid", "heatmap", "map_sheet", "markdown_table", "outlined",
    "overlay", "scale_of", "stacked", "table", "time_strip",
]  # fmt: skip

GREY = 127.5
FADED = 0.3  # of its contrast that a photograph keeps under a map
STRONG = 2 / 3  # of the scale: from there on a line is drawn round
LINE = 256  # px of the shorter side for each px of a line's half width
OF_REGIONS = (0, 229, 255)  # cyan: not among the colours of maps


class RegionLike(Protocol):
    """What can be outlined: `hookctl.Region`."""

    @property
    def name(self) -> str | None: ...

    def coverage(self, height: int, width: int) -> Tensor: ...


def heatmap(
    map: Tensor,
    size: tuple[int, int] | None = None,
    normalise: bool = True,
    *,
    smooth: bool = False,
    scale: Scale | None = None,
) -> Picture:
    """A map in colour, black to red to pale yellow.

    Receives: a map [h, w], any float type; the size of the image (width, height) in px, or
    None for about 256; whether the least value becomes 0 and the greatest 1 (otherwise values are
    cut to 0 to 1); whether cells blend into each other; the values of the first and the last
    colour, in place of the map's own. Returns: an RGB image.
    """
    values = _scaled(map, normalise, scale)
    if size is None:
        factor = max(1, round(SMALL / max(values.shape)))
        size = (values.shape[1] * factor, values.shape[0] * factor)
    return coloured(resized(values, size, smooth))


def overlay(
    image: Picture,
    map: Tensor,
    alpha: float = 0.8,
    label: str | None = None,
    *,
    normalise: bool = True,
    scale: Scale | None = None,
    regions: Sequence[RegionLike] = (),
) -> Picture:
    """A map over its image: the stronger, the more of its colour; a line round what is strong.

    The image fades towards grey, so that on white and on black alike both the colours and the
    line, white in black, stand out.

    Receives: an image, enlarged if its shorter side is below 256 px; a map [h, w]; the strength
    of the colour, 0 to 1; a word for the corner; `normalise` and `scale` as for `heatmap`; regions
    to be outlined. Returns: RGB.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: {alpha!r} given; a number from 0 to 1 expected")
    image = _enlarged(image)
    values = resized(_scaled(map, normalise, scale), image.size, smooth=True)
    weight = (min(1.0, 1.3 * alpha) * values)[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    faded = GREY + FADED * (grey - GREY)
    photo = np.asarray(image) * (1 - alpha) + faded * alpha  # its colours must not pass for heat
    mixed = photo * (1 - weight) + np.asarray(coloured(values)) * weight
    if alpha:
        _draw_edge(mixed, values >= STRONG, (255, 255, 255))
    result = Image.fromarray(mixed.round().astype(np.uint8))
    result = outlined(result, regions)
    if label:
        tag(result, label)
    return result


def outlined(image: Picture, regions: Sequence[RegionLike]) -> Picture:
    """The image with the outlines of regions, and the names of those that have one."""
    image = _enlarged(image)
    if not regions:
        return image
    pixels = np.asarray(image, dtype=np.float64).copy()
    masks = [np.asarray(one.coverage(image.height, image.width)) >= 0.5 for one in regions]
    for inside in masks:
        _draw_edge(pixels, inside, OF_REGIONS, framed=True)
    result = Image.fromarray(pixels.round().astype(np.uint8))
    for one, inside in zip(regions, masks, strict=True):
        if one.name and inside.any():
            ys, xs = np.nonzero(inside)
            tag(result, one.name, (float(xs.min()) + 4, float(ys.min()) + 4))
    return result


def time_strip(
    maps: Sequence[Tensor],
    labels: Sequence[str],
    image: Picture | None = None,
    *,
    cell: tuple[int, int] | None = None,
    bar: bool = False,
) -> Picture:
    """One word over the steps: its maps side by side, all on one colour scale.

    Receives: maps [h, w], one per step; a label for each; the image to lay them over, if any;
    whether to draw the bar of the scale at the end of the row.
    """
    if not maps or len(maps) != len(labels):
        given = f"{len(maps)} maps, {len(labels)} labels"
        raise InputError(f"labels: {given} given; one label per map and a map or more expected")
    scale = scale_of(maps)
    if image is None:
        images = [heatmap(one, cell, scale=scale) for one in maps]
    else:
        images = [overlay(image, one, scale=scale) for one in maps]
    return grid([images], column_titles=labels, cell=cell, scales=[scale] if bar else None)


def map_sheet(
    image: Picture,
    maps: Mapping[str, Tensor],
    regions: Mapping[str, Sequence[RegionLike]] | None = None,
) -> tuple[Picture, dict[str, Scale]]:
    """An image and the maps of words over it, in rows: each row on one scale, with its bar.

    Receives: an image; maps [h, w] by word; regions to be outlined, by word. Returns: the sheet,
    and the scale on which each word is shown.
    """
    marked = regions or {}
    columns, cell = abreast([image])
    places = ["", *maps]
    columns = math.ceil(len(places) / math.ceil(len(places) / columns))
    pieces, scales = [], {}
    for first in range(0, len(places), columns):
        words = places[first : first + columns]
        here = [word for word in words if word]
        scale = scale_of(maps[word] for word in here) if here else None
        row: list[Picture | None] = [image] if first == 0 else []
        for word in here:
            assert scale is not None
            scales[word] = scale
            row.append(overlay(image, maps[word], scale=scale, regions=marked.get(word, ())))
        titles = ["image" if first == 0 and i == 0 else word for i, word in enumerate(words)]
        pieces.append(grid([row], titles, cell=cell, scales=[scale], widest=None))
    return stacked(pieces), scales


def _scaled(map: Tensor, normalise: bool, scale: Scale | None) -> Array:
    """The values of a map where 0 is the first colour and 1 the last."""
    values = values_of(map)
    if scale is not None:
        return normalised(values, *scale)
    return normalised(values, values.min(), values.max()) if normalise else values


def _draw_edge(
    pixels: Array, inside: Array, colour: tuple[int, int, int], framed: bool = False
) -> None:
    """Draw the rim of what is inside [height, width], into pixels [height, width, 3]: in black,
    and within that in the colour. framed: the image's own edge counts as a rim."""
    half = max(1, round(min(inside.shape) / LINE))
    if framed:
        inside = np.pad(inside, 1)
        edges = [edge_of(inside, width)[1:-1, 1:-1] for width in (2 * half, half)]
    else:
        edges = [edge_of(inside, width) for width in (2 * half, half)]
    for edge, ink in zip(edges, ((0, 0, 0), colour), strict=True):
        pixels[edge] = ink


def _enlarged(image: Picture) -> Picture:
    """RGB, enlarged by a whole factor if small."""
    factor = math.ceil(SMALL / min(image.size))
    rgb = image.convert("RGB")
    return rgb.resize((rgb.width * factor, rgb.height * factor), Resampling.LANCZOS)
