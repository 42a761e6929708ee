"""Maps as colours: values of attention, the scale that they are shown on, and its bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw
from PIL.Image import Resampling
from torch import Tensor

from hookctl.errors import InputError
from hookctl.inspect.lettering import INK, extent, font_of

Array: TypeAlias = np.ndarray[Any, Any]
Picture: TypeAlias = Image.Image
Scale: TypeAlias = tuple[float, float]  # the values of the first and the last colour

# inferno: perceptually even, readable in grey and by the colour-blind; nine anchors of RGB
INFERNO = np.array(
    [
        (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51),
        (249, 142, 9), (249, 201, 50), (252, 255, 164),
    ]
)  # fmt: skip


def scale_of(maps: Iterable[Tensor]) -> Scale:
    """One scale for several maps: from 0, or the least value below, to the greatest.

    Attention is a share: 0 says something, and a map that is nowhere strong looks so.
    """
    arrays = [values_of(map) for map in maps]
    if not arrays:
        raise InputError("maps: none given; at least one expected")
    return min(0.0, *(float(a.min()) for a in arrays)), max(float(a.max()) for a in arrays)


def values_of(map: Tensor) -> Array:
    if not isinstance(map, Tensor) or map.ndim != 2 or not map.numel():
        given = f"shape {list(map.shape)}" if isinstance(map, Tensor) else type(map).__name__
        raise InputError(f"map: {given} given; a tensor [h, w] expected")
    values: Array = map.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise InputError("map: NaN or infinite values given; finite ones expected")
    return values


def normalised(values: Array, low: float, high: float) -> Array:
    """From low to high to 0 to 1; a flat map is 0."""
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def resized(values: Array, size: tuple[int, int], smooth: bool) -> Array:
    """Values [h, w] to [height, width], cut to 0 to 1."""
    image = Image.fromarray(values.astype(np.float32))
    enlarged = image.resize(size, Resampling.BICUBIC if smooth else Resampling.NEAREST)
    return np.asarray(enlarged, dtype=np.float64).clip(0, 1)


def coloured(values: Array) -> Picture:
    """Values [height, width], 0 to 1, as RGB."""
    anchors = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(values, anchors, channel) for channel in INFERNO.T]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def edge_of(inside: Array, width: int) -> Array:
    """Where a line of `width` px lies on the rim of what is inside [height, width], bool."""
    padded = np.pad(inside, width, mode="edge")
    height, length = inside.shape
    near = np.zeros_like(inside)
    for dy in range(-width, width + 1):
        for dx in range(-width, width + 1):
            y, x = width + dy, width + dx
            near |= padded[y : y + height, x : x + length] != inside
    return near


def colour_bar(scale: Scale, height: int, ink: tuple[int, ...] = INK) -> Picture:
    """The colours of a scale, the greatest value on top, with its ends and middle as numbers."""
    font = font_of(max(12, min(18, height // 14)))
    low, high = scale
    # (text, its place from the top, which of its edges stands there)
    ends = ((high, 0.0, "a"), ((low + high) / 2, 0.5, "m"), (low, 1.0, "d"))
    texts = [(f"{value:.2g}", at, edge) for value, at, edge in ends]
    wide, margin = max(12, height // 16), 6
    size = (wide + 2 * margin + max(extent(text, font)[0] for text, *_ in texts), height)
    bar = Image.new("RGBA", size, (0, 0, 0, 0))
    colours = coloured(np.linspace(1, 0, height)[:, None].repeat(wide, 1))
    bar.paste(colours, (0, 0))
    draw = ImageDraw.Draw(bar)
    draw.rectangle((0, 0, wide - 1, height - 1), outline=(*ink, 255))
    for text, at, edge in texts:
        y = at * (height - 1)
        draw.line((wide, y, wide + 3, y), (*ink, 255))
        draw.text((wide + margin, y), text, (*ink, 255), font, f"l{edge}")
    return bar
