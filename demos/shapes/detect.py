"""Reads colour, shape, size, pattern and box of every object off an image.

    detection = detect(image)
    matches(detection, "a red circle above a blue square")

Blobs are what differs from the flat background; the shape is the best template by intersection over
union after bringing blob and template to the same area, so objects may lie off
the lattice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from .captions import Request, parse
from .world import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    COLOUR_NAMES,
    COLOURS,
    SHADE,
    SHAPES,
    SIZE_NAMES,
    Box,
    Scene,
    stamp,
)  # fmt: skip

Mask = NDArray[np.bool_]
Picture = Image.Image | NDArray[np.uint8] | NDArray[np.floating]

CONTRAST = 60.0  # RGB distance from the background that makes a pixel foreground
SPECK = 25  # px, smaller blobs are ignored
FIT = 0.70  # intersection over union below which a blob has no shape
PALETTE_DISTANCE = 90.0  # RGB distance beyond which a blob has no colour
STRIPED = 0.2  # contrast of bars from which on an object is striped (truth: 0.45)
FRAME = 40  # px, side of the square in which shapes are compared
AREA = 500.0  # px that every compared shape is scaled to

_PALETTE = np.array(list(COLOURS.values()), float)
_BACKGROUNDS = np.array(list(BACKGROUNDS.values()), float)


@dataclass(frozen=True)
class Found:
    """One blob: names, `box` (x0, y0, x1, y1) in px (exclusive ends), `centre` (x, y) of mass in
    px, `area` in px, `fit` (IoU with the template), `contrast` of the bars (0 to 1), `distance`
    from the palette (RGB, 0 to 441) and the `mask` [height, width]."""

    shape: str
    colour: str
    pattern: str
    size: str
    box: Box
    centre: tuple[float, float]
    area: int
    fit: float
    contrast: float
    distance: float
    mask: Mask = field(repr=False, compare=False)


@dataclass(frozen=True)
class Detection:
    """Confident `objects`, low-confidence `extras`, and the `background` by name and RGB
    (0-255)."""

    objects: tuple[Found, ...]
    extras: tuple[Found, ...]
    background: str
    background_colour: tuple[float, float, float]

    def find(self, shape: str | None = None, colour: str | None = None) -> Found | None:
        """The largest object of this shape and colour (None: any), or None."""
        hits = [o for o in self.objects if shape in (None, o.shape) and colour in (None, o.colour)]
        return max(hits, key=lambda o: o.area, default=None)

    @property
    def pairs(self) -> Counter[tuple[str, str]]:
        """How often each (shape, colour) was found with confidence."""
        return Counter((o.shape, o.colour) for o in self.objects)


def to_pixels(image: Picture) -> NDArray[np.float64]:
    """A PIL image, uint8 [h, w, 3] or float [h, w, 3] in 0 to 1 -> float64 [h, w, 3], 0 to 255."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an image [height, width, 3], got shape {pixels.shape}")
    scale = 1.0 if pixels.dtype == np.uint8 else 255.0
    return pixels.astype(float) * scale


def _normalised(mask: Mask) -> Mask:
    """A mask [h, w] moved to the middle of a frame and scaled to the common area."""
    cover = mask.astype(float)
    zoom = (cover.sum() / AREA) ** 0.5
    centre = np.array(ndimage.center_of_mass(cover))
    offset = centre - zoom * (FRAME - 1) / 2
    moved: NDArray[np.float64] = ndimage.affine_transform(
        ndimage.gaussian_filter(cover, max(zoom - 1.0, 0.0) * 0.5),
        np.array([zoom, zoom]), offset, (FRAME, FRAME), order=1,
    )  # fmt: skip
    return moved >= 0.5


@lru_cache(maxsize=1)
def _templates() -> tuple[tuple[str, Mask], ...]:
    """Every shape in every size, normalised."""
    return tuple((s, _normalised(stamp(s, z) >= 0.5)) for s in SHAPES for z in SIZE_NAMES)


def _foreground(apart: NDArray[np.float64]) -> Mask:
    """What stands off the background by `apart`, without the edge pixels that it covers by less
    than half."""
    mask: Mask = apart > CONTRAST
    edge = mask & ~ndimage.binary_erosion(mask)
    return mask & ~(edge & (apart < 0.5 * ndimage.maximum_filter(apart, 3)))


def _shape(mask: Mask) -> tuple[str, float]:
    """The best template and its intersection over union."""
    mine = _normalised(mask)
    fits = [(float((mine & t).sum() / max((mine | t).sum(), 1)), name) for name, t in _templates()]
    fit, name = max(fits)
    return name, fit


def _colour(pixels: NDArray[np.float64], mask: Mask) -> tuple[str, float]:
    """Nearest palette colour of the brighter half of the inner pixels, and its RGB distance."""
    inner = ndimage.binary_erosion(mask)
    values = pixels[inner if inner.sum() >= 12 else mask]
    light = values.sum(1)
    dark, bright = np.percentile(light, (10, 90))
    centre = np.median(values[light >= (dark + bright) / 2], axis=0)
    apart = np.linalg.norm(_PALETTE - centre, axis=1)
    return COLOUR_NAMES[int(apart.argmin())], float(apart.min())


def _contrast(pixels: NDArray[np.float64], mask: Mask, colour: str) -> float:
    """1 - dark / bright over rows at the best phase of the 8 px period, colour-weighted."""
    inner = ndimage.binary_erosion(mask)
    inner = inner if inner.sum() >= 12 else mask
    ys, _ = np.nonzero(inner)
    hue = np.array(COLOURS[colour], float)
    level = pixels[inner] @ hue / (hue @ hue)
    best = 0.0
    for phase in range(4):
        odd = ((ys + phase) // 4) % 2 == 1
        if odd.sum() >= 6 and (~odd).sum() >= 6:
            low, high = sorted((np.median(level[odd]), np.median(level[~odd])))
            best = max(best, 1.0 - low / max(high, 0.05))
    return float(best)


def _split(pixels: NDArray[np.float64], mask: Mask) -> list[Mask]:
    """Parts of a blob where two palette colours touch; the blob itself when there is one."""
    names = np.concatenate([_PALETTE, _PALETTE * SHADE])
    ys, xs = np.nonzero(mask)
    apart = np.linalg.norm(pixels[ys, xs][:, None] - names, axis=2)
    label = np.full(mask.shape, -1)
    label[ys, xs] = np.where(apart.min(1) < 70.0, apart.argmin(1) % len(_PALETTE), -1)
    seeds = []
    for k in range(len(_PALETTE)):
        part = ndimage.binary_opening(label == k, np.ones((3, 3)))
        count = int(part.sum())
        if count >= max(80, 0.12 * len(ys)):
            seeds.append(part)
    if len(seeds) < 2:
        return [mask]
    reach = np.stack([ndimage.distance_transform_edt(~s) for s in seeds])
    nearest = reach.argmin(0)
    return [mask & (nearest == i) for i in range(len(seeds))]


def _describe(pixels: NDArray[np.float64], mask: Mask) -> Found:
    shape, fit = _shape(mask)
    colour, distance = _colour(pixels, mask)
    contrast = _contrast(pixels, mask, colour)
    area = int(mask.sum())
    size = min(SIZE_NAMES, key=lambda s: abs(np.log((stamp(shape, s) >= 0.5).sum() / area)))
    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    centre = (float(xs.mean() + 0.5), float(ys.mean() + 0.5))
    pattern = "striped" if contrast >= STRIPED else "plain"
    return Found(shape, colour, pattern, size, box, centre, area, fit, contrast, distance, mask)


def detect(image: Picture) -> Detection:
    """Read an image.

    Receives: a PIL image, uint8 [height, width, 3], or float [height, width, 3] in 0 to 1.
    Returns: objects from large to small; blobs without a clear shape or colour are `extras`.
    """
    pixels = to_pixels(image)
    frame = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
         pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)]
    )  # fmt: skip
    background = np.median(frame, axis=0)
    name = BACKGROUND_NAMES[int(np.linalg.norm(_BACKGROUNDS - background, axis=1).argmin())]
    labels, count = ndimage.label(_foreground(np.linalg.norm(pixels - background, axis=2)))
    found: list[Found] = []
    for i in range(1, count + 1):
        blob = labels == i
        if blob.sum() < SPECK:
            continue
        for part in _split(pixels, blob):
            whole, pieces = ndimage.label(part)
            sizes = ndimage.sum(part, whole, range(1, pieces + 1))
            found += [_describe(pixels, whole == k + 1) for k in range(pieces) if sizes[k] >= SPECK]
    found.sort(key=lambda f: -f.area)
    sure = [f.fit >= FIT and f.distance <= PALETTE_DISTANCE and f.area >= 80 for f in found]
    return Detection(
        tuple(f for f, s in zip(found, sure, strict=True) if s),
        tuple(f for f, s in zip(found, sure, strict=True) if not s),
        name,
        (float(background[0]), float(background[1]), float(background[2])),
    )


Wanted = Scene | Request | str | Iterable[tuple[str, str]]


def wanted_pairs(wanted: Wanted) -> Counter[tuple[str, str]]:
    """How often each (shape, colour) is asked for by a scene, a caption or a list of pairs."""
    if isinstance(wanted, str):
        wanted = parse(wanted)
    if isinstance(wanted, Scene):
        return Counter((t.shape, t.colour) for t in wanted.things)
    if isinstance(wanted, Request):
        return Counter((m.shape, m.colour) for m in wanted.mentions)
    return Counter((shape, colour) for shape, colour in wanted)


def matches(detection: Detection, wanted: Wanted) -> bool:
    """Whether each wanted object is there with its colour and shape, and nothing else at all."""
    return not detection.extras and detection.pairs == wanted_pairs(wanted)
