"""What the page shows as pictures: maps over what was drawn, places in their colours."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from PIL.Image import Resampling

from hookctl.app.places import Box, Place
from hookctl.app.reading import PLACES
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


def outlined(image: Image.Image, places: Sequence[Place]) -> Image.Image:
    """The picture with the outlines of places, each in its colour."""
    image = image.convert("RGB")
    line = max(2, min(image.size) // 128)
    for n, place in enumerate(places):
        inside = _filled(place, image.size)
        for colour, wide in (("black", line + 2), (COLOURS[n % len(COLOURS)], line)):
            inner = inside.filter(ImageFilter.MinFilter(2 * wide + 1))
            # Beyond the picture is outside.
            inner = ImageOps.expand(ImageOps.crop(inner, wide), wide)
            image.paste(colour, mask=ImageChops.subtract(inside, inner))
    return image


def _filled(place: Place, size: tuple[int, int]) -> Image.Image:
    """White inside of a place, of mode "L"."""
    if not isinstance(place, Box):
        return (
            place.mask.convert("L")
            .resize(size, Resampling.BILINEAR)
            .point(lambda v: 255 * (v > 127))
        )
    image = Image.new("L", size)
    corners = [place.x0 * size[0], place.y0 * size[1]]
    corners += [place.x1 * size[0] - 1, place.y1 * size[1] - 1]
    ImageDraw.Draw(image).rectangle(corners, fill="white")
    return image


def map_picture(
    image: Image.Image,
    maps: Mapping[str, Tensor],
    word: str,
    step: int | None,
    places: Sequence[Place] = (),
) -> Image.Image:
    """A word's map over the picture, all words and steps on one scale; step: None for their mean.

    maps: [steps, height, width] by word. The scale ends where the strongest `BRIGHT` begin: single
    cells that look at one word alone would leave everything else dark.
    """
    scale = _scale(torch.stack([*maps.values()]))
    map = maps[word].mean(0) if step is None else maps[word][step]
    return outlined(show.overlay(_enlarged(image), map, scale=scale), places)


def looks_picture(image: Image.Image, looks: Tensor, x: float, y: float) -> Image.Image:
    """What the place (x, y), from 0 to 1, looks at in the picture, the place ringed.

    looks: [PLACES * PLACES, height, width]. All places are on one scale, which begins at the
    median: much of every place's attention goes everywhere.
    """
    column, row = (min(int(at * PLACES), PLACES - 1) for at in (x, y))
    scale = _scale(looks, float(looks.median()))
    drawn = show.overlay(_enlarged(image), looks[row * PLACES + column], scale=scale)
    draw = ImageDraw.Draw(drawn)
    middle = [drawn.width * (column + 0.5) / PLACES, drawn.height * (row + 0.5) / PLACES]
    for radius, colour, wide in ((13, "black", 6), (12, "white", 3)):
        corners = [at + sign * radius for sign in (-1, 1) for at in middle]
        draw.ellipse(corners, outline=colour, width=wide)
    return drawn


def _scale(maps: Tensor, low: float = 0.0) -> tuple[float, float]:
    """Of maps that are to be compared: to where the strongest `BRIGHT` begin."""
    every = maps.flatten()
    high = float(every.kthvalue(max(1, round((1 - BRIGHT) * len(every)))).values)
    return low, max(high, low + 1e-6)


def hues(words: Sequence[str], places: Sequence[Place]) -> str:
    """HTML: a style that underlines each word, the nth of a list, in the colour of the places
    whose text has it."""
    rules = []
    for n, word in enumerate(words, 1):
        of = [COLOURS[k % len(COLOURS)] for k, one in enumerate(places) if _says(one.text, word)]
        if of and (len(of) < len(places) or len(places) == 1):  # what all have tells nothing
            share = 100 / len(of)
            stops = [f"{hue} {share * k:.0f}% {share * (k + 1):.0f}%" for k, hue in enumerate(of)]
            line = f"background:linear-gradient(90deg,{','.join(stops)})"
            rules.append(f"#word label:nth-child({n})::after{{{line}}}")
    return f"<style>{''.join(rules)}</style>"


def _says(text: str, word: str) -> bool:
    return f" {word.lower()} " in f" {' '.join(text.lower().split())} "


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
