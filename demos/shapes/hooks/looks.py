"""Looks that the world has no words for: any hue, and bars of any depth.

The world's sentences know six colours and two patterns. An object of a free look is drawn like any
other, but for its colour, which may be any on the circle, and for the depth of its bars, from none
to almost black.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..captions import describe
from ..detect import Found, detect, to_pixels
from ..world import (
    BACKGROUNDS,
    COLOUR_NAMES,
    COLOURS,
    IMAGE_SIZE,
    STAMP,
    STRIPE,
    Scene,
    Thing,
    stamp,
)

SATURATION, BRIGHTNESS = 0.85, 0.88
DEEPEST = 0.7
APART = 40.0  # RGB distance from the background; the deepest bars are 67 from black
INNER = 12  # px that are enough to read a look of


@dataclass(frozen=True)
class Look:
    """A hue in degrees, 0 red to 360, and the depth of the bars: 0 none, 1 black."""

    hue: float
    depth: float

    @property
    def rgb(self) -> tuple[float, float, float]:
        """The colour between the bars, 0 to 1."""
        return colorsys.hsv_to_rgb(self.hue / 360 % 1, SATURATION, BRIGHTNESS)


@dataclass(frozen=True)
class Seen:
    """What is read off a picture: the look, shape, box (px) and mask of its largest object."""

    look: Look
    found: Found


def sample_look(rng: np.random.Generator) -> Look:
    return Look(float(rng.uniform(0, 360)), float(rng.uniform(0, DEEPEST)))


def render_looks(scenes: Sequence[Scene], looks: Sequence[Sequence[Look]]) -> Tensor:
    """Draw scenes whose things have these looks in place of their colours and patterns.

    Returns: float32 [batch, 3, 128, 128], RGB from -1 to 1.
    """
    side = IMAGE_SIZE + STAMP
    canvas = np.empty((len(scenes), 3, side, side), np.float32)
    dark = np.arange(-STAMP // 2, side - STAMP // 2) // STRIPE % 2
    for image, scene, own in zip(canvas, scenes, looks, strict=True):
        image[:] = np.array(BACKGROUNDS[scene.background])[:, None, None] / 255
        for thing, look in zip(scene.things, own, strict=True):
            x, y = thing.centre  # of the stamp's corner on the padded canvas
            cover = stamp(thing.shape, thing.size)
            shade = 1 - look.depth * dark[y : y + STAMP, None]
            part = image[:, y : y + STAMP, x : x + STAMP]
            part += cover * (np.array(look.rgb)[:, None, None] * shade - part)
    half = STAMP // 2
    cut = canvas[..., half : half + IMAGE_SIZE, half : half + IMAGE_SIZE]
    return torch.from_numpy(np.ascontiguousarray(cut)).float() * 2 - 1


def read_look(image: object) -> Seen | None:
    """The largest object of a picture, None if there is none.

    The hue is that of its mean colour, the depth what is missing in the rows of the bars; so both
    are read without whatever made the picture.
    """
    pixels = to_pixels(image)  # type: ignore[arg-type]
    frame = np.concatenate([pixels[:2], pixels[-2:]]).reshape(-1, 3)
    apart = np.linalg.norm(pixels - np.median(frame, axis=0), axis=2)
    labels, count = ndimage.label(apart > APART)
    if not count:
        return None
    sizes = ndimage.sum_labels(labels > 0, labels, range(1, count + 1))
    blob = labels == 1 + int(np.argmax(sizes))
    found = _found(blob)
    inner = ndimage.binary_erosion(blob, iterations=2)
    if found is None or inner.sum() < INNER:
        return None
    return Seen(_look(pixels, inner), found)


def _found(blob: NDArray[np.bool_]) -> Found | None:
    """The detector's reading of a blob, whatever its colours: drawn red on white."""
    flat = np.full((*blob.shape, 3), 255, np.uint8)
    flat[blob] = 222, 28, 40
    objects = detect(flat)
    every = (*objects.objects, *objects.extras)
    return max(every, key=lambda one: one.area, default=None)


def _look(pixels: NDArray[np.float64], inner: NDArray[np.bool_]) -> Look:
    mean = pixels[inner].mean(0)
    hue = 360 * colorsys.rgb_to_hsv(*(mean / 255))[0]
    level = pixels[inner] @ mean
    dark = np.nonzero(inner)[0] // STRIPE % 2 == 1
    if dark.sum() < INNER // 2 or (~dark).sum() < INNER // 2:
        return Look(hue, 0.0)
    depth = 1 - level[dark].mean() / max(level[~dark].mean(), 1e-6)
    return Look(hue, float(np.clip(depth, 0, 1)))


def hue_apart(a: Look, b: Look) -> float:
    """Degrees between two hues, 0 to 180."""
    apart = abs(a.hue - b.hue) % 360
    return min(apart, 360 - apart)


def nearest_colour(look: Look) -> str:
    """The word for the colour of the world whose hue is nearest."""

    def hue(name: str) -> float:
        return 360 * colorsys.rgb_to_hsv(*(v / 255 for v in COLOURS[name]))[0]

    return min(COLOUR_NAMES, key=lambda name: hue_apart(look, Look(hue(name), 0)))


def say(thing: Thing, colour: str | None = None) -> str:
    """'a large circle': the shape and size of a thing, and a colour if one is given."""
    words = describe(replace(thing, pattern="plain", colour=colour or "red")).split()
    if colour is None:
        words.remove("red")
        words[0] = "a"
    return " ".join(words)
