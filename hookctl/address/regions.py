"""Where an edit acts: points, scribbles, boxes, polygons and masks on any token grid.

A region knows fractions of the canvas only (x to the right, y down, 0 to 1), never pixels, so the
same one serves every resolution and aspect ratio. Grid cells are taken as square: the radius of a
point and the width of a scribble are fractions of the shorter side, and stay round.
"""

from __future__ import annotations

import binascii
import math
import re
from base64 import b64decode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hookctl.address.outlines import Box, Combined, Mask, Outline, Points, Polygon, Stroke
from hookctl.address.pixels import MaskLike, mask_values
from hookctl.arguments.values import as_float, is_list, is_number, shown
from hookctl.errors import InputError

BITS = 64
BACKGROUND = -(1 << 63)  # bit 63, the sign
INLINE = "data:image/png;base64,"  # before a mask that is written out (RFC 2397)
SLACK = 1e-6  # rounding that is forgiven in coordinates and thresholds
FORMS = (
    "full, box:x0,y0,x1,y1, point:x,y[,radius], scribble:x,y;x,y;..[@width],"
    " polygon:x,y;x,y;x,y;.. or mask:path, with fractions of the canvas; name=... before it"
)


@dataclass(frozen=True)
class Region:
    """A part of the canvas. Made by `box`, `point`, `scribble`, `polygon`, `mask`, `full` or
    `parse_region`; combined by `|` (or), `&` (and), `~` (not)."""

    outline: Outline
    name: str | None = None

    @classmethod
    def box(cls, x0: float, y0: float, x1: float, y1: float, *, name: str | None = None) -> Region:
        """The rectangle from the corner (x0, y0) to (x1, y1), as fractions of the canvas."""
        x0, y0, x1, y1 = (
            _number(v, f"box {k}") for k, v in {"x0": x0, "y0": y0, "x1": x1, "y1": y1}.items()
        )
        if x0 >= x1 or y0 >= y1:
            given = f"{x0:g}, {y0:g}, {x1:g}, {y1:g}"
            raise InputError(f"box: {given} given; x0 < x1 and y0 < y1 expected")
        return cls(Box(x0, y0, x1, y1), name)

    @classmethod
    def full(cls, *, name: str | None = None) -> Region:
        """The whole canvas."""
        return cls(Box(0.0, 0.0, 1.0, 1.0), name)

    @classmethod
    def point(cls, x: float, y: float, radius: float = 0.05, *, name: str | None = None) -> Region:
        """A disc; `radius` is a fraction of the shorter side."""
        return cls(Stroke(_points([(x, y)], "point", 1), _size(radius, "point radius")), name)

    @classmethod
    def scribble(
        cls, points: Iterable[Sequence[float]], width: float = 0.05, *, name: str | None = None
    ) -> Region:
        """A line with round ends through `points`, (x, y) each; `width` is the whole width of
        the line, as a fraction of the shorter side."""
        half = _size(width, "scribble width") / 2
        return cls(Stroke(_points(points, "scribble", 2), half), name)

    @classmethod
    def polygon(cls, points: Iterable[Sequence[float]], *, name: str | None = None) -> Region:
        """The inside of a closed outline of (x, y) corners, three or more; where it crosses
        itself, by the even-odd rule."""
        outline = Polygon(_points(points, "polygon", 3))
        if outline.coverage(1, 1).sum() < 1e-12:
            given = list(outline.points)
            raise InputError(f"polygon: {given} encloses no area; corners not in line expected")
        return cls(outline, name)

    @classmethod
    def mask(cls, mask: MaskLike, *, name: str | None = None) -> Region:
        """Where an image is bright, softly; it is stretched over the canvas.

        Receives: a grey PIL image of any depth, or a transparent one (its alpha channel is the
        mask), or [height, width] of bool, of floats from 0 to 1, or of whole numbers from 0 to 255
        (if none is above 1, they count as off and on).
        """
        return cls(Mask(mask_values(mask)), name)

    def named(self, name: str) -> Region:
        """The same region under another name."""
        return replace(self, name=name)

    def __or__(self, other: Region) -> Region:
        return Region(Combined("or", (self.outline, other.outline)))

    def __and__(self, other: Region) -> Region:
        return Region(Combined("and", (self.outline, other.outline)))

    def __invert__(self) -> Region:
        return Region(Combined("not", (self.outline,)))

    def coverage(self, height: int, width: int) -> Tensor:
        """How much of each grid cell lies inside.

        Receives: the grid. Returns: float32 [height, width], 0 to 1: exact for boxes and masks,
        sampled for the rest. Raises `InputError` if a combination leaves nothing.
        """
        for argument, size in {"height": height, "width": width}.items():
            if not isinstance(size, int) or size < 1:
                raise InputError(f"{argument}: {size!r} given; a whole number of cells expected")
        covered = self.outline.coverage(height, width)
        if covered.max() <= 0:
            label = f"region {self.name!r}" if self.name else "region"
            raise InputError(f"{label}: an empty combination given; parts that overlap expected")
        return torch.from_numpy(covered.clip(0, 1).astype(np.float32))

    def feathered(self, height: int, width: int, edge: float) -> Tensor:
        """How much of each grid cell lies inside, with a border that falls off softly.

        Receives: the grid; the width of the border, a fraction of the shorter side (a Gaussian
        of half that as standard deviation; the edge of the canvas is no border). Returns: float32
        [height, width], 0 to 1.
        """
        sigma = edge / 2 * min(height, width)
        covered = self.coverage(height, width)
        reach = math.ceil(3 * sigma)
        if not reach:
            return covered
        away = torch.arange(-reach, reach + 1) / sigma
        kernel = torch.softmax(-(away**2) / 2, 0)
        wide = F.pad(covered[None, None], (reach,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(wide, kernel[None, None, None]), kernel[None, None, :, None])[0, 0]

    def tokens(self, height: int, width: int, threshold: float = 0.5) -> Tensor:
        """Which tokens of a grid belong.

        A cell belongs if at least `threshold` of it is covered. A region too small or too thin
        for that on a coarse grid never vanishes: it keeps the cells that it covers most (at least
        half as much as its best one, so that a line stays a line).

        Receives: the grid; a threshold above 0, up to 1. Returns: bool [height * width].
        """
        enough = _size(threshold, "threshold") * (1 - SLACK)
        covered = self.coverage(height, width).flatten()
        peak = float(covered.max())
        return covered >= (enough if peak >= enough else peak / 2)


RegionLike: TypeAlias = Region | str | Sequence[float] | MaskLike


def region_of(value: Any, argument: str = "region") -> Region:
    """A region, however it is written: a `Region`, a text of `parse_region`, a box (x0, y0, x1,
    y1) or a mask. Raises `InputError` that names the argument."""
    if isinstance(value, Region):
        return value
    try:
        if isinstance(value, str):
            return parse_region(value)
        if isinstance(value, Tensor | Image.Image | np.ndarray):
            return Region.mask(value)
        if is_list(value) and len(value) == 4:
            return Region.box(*value)
    except InputError as error:
        raise InputError(f"{argument}: {error}") from None
    raise InputError(
        f"{argument}: {shown(value)} given; a Region, a box (x0, y0, x1, y1), a mask, or {FORMS}"
    )


def bit(index: int) -> int:
    """The int64 value whose only set bit is `index`, 0 to 63 (the sign)."""
    if not 0 <= index < BITS:
        raise InputError(f"index: {index} given; a bit from 0 to {BITS - 1} expected")
    return 1 << index if index < BITS - 1 else BACKGROUND


def bit_sets(
    regions: Sequence[Region],
    height: int,
    width: int,
    *,
    background: bool = True,
    threshold: float = 0.5,
) -> Tensor:
    """The regions of each token as bits: a query may see a key if the two share one.

    Receives: up to 63 regions, or 64 without background; the grid; the threshold of
    `Region.tokens`. Returns: int64 [height * width]; bit r is set where the token lies in region
    r. A token in no region has bit 63 alone (`BACKGROUND`); with `background=False` it has none.
    """
    most = BITS - int(background)
    if not 1 <= len(regions) <= most:
        reason = f"{BITS} bits, one for the background" if background else f"{BITS} bits"
        raise InputError(f"regions: {len(regions)} given; 1 to {most} expected ({reason})")
    for r, region in enumerate(regions):
        if not isinstance(region, Region):
            raise InputError(f"regions[{r}]: {type(region).__name__} given; a Region expected")
    members = [region.tokens(height, width, threshold) for region in regions]
    bits = torch.zeros(height * width, dtype=torch.int64)
    for r, member in enumerate(members):
        bits[member] |= bit(r)
    if background:
        bits[bits == 0] = BACKGROUND
    return bits


def parse_region(text: str) -> Region:
    """A region from the command line or a file.

    `full`, `box:0.1,0.2,0.5,0.6`, `point:0.5,0.5` or `point:0.5,0.5,0.1` (radius),
    `scribble:0.1,0.1;0.5,0.6` or `...@0.08` (width), `polygon:0.1,0.1;0.9,0.1;0.5,0.8`,
    `mask:path.png`, or `mask:data:image/png;base64,...` with the image itself; with `name=` before
    it, the region has that name.
    """
    match = re.fullmatch(r"\s*(?:([^:=]+)=)?\s*(\w+)\s*(?::(.*))?", text, re.DOTALL)
    if match is None:
        raise InputError(f"region: {text!r} given; expected {FORMS}")
    name, kind, body = match[1].strip() if match[1] else None, match[2], (match[3] or "").strip()
    if kind == "mask" and body:
        try:
            with Image.open(_inline(body) if body.startswith("data:") else body) as image:
                return Region.mask(image, name=name)
        except (OSError, SyntaxError) as error:
            raise InputError(f"region: {shown(text)} given; a readable image expected") from error
    body, _, width = body.partition("@") if kind == "scribble" else (body, "", "")
    try:
        points = [[float(v) for v in point.split(",")] for point in body.split(";") if point]
        sizes = [float(width)] if width else []
    except ValueError:
        raise InputError(f"region: {text!r} given; expected {FORMS}") from None
    match kind, [len(point) for point in points]:
        case "full", []:
            return Region.full(name=name)
        case "box", [4]:
            return Region.box(*points[0], name=name)
        case "point", [2 | 3]:
            return Region.point(*points[0], name=name)
        case "scribble", [_, *_]:
            return Region.scribble(points, *sizes, name=name)
        case "polygon", [_, *_]:
            return Region.polygon(points, name=name)
    raise InputError(f"region: {text!r} given; expected {FORMS}")


def _inline(text: str) -> BytesIO:
    """The image that a text holds."""
    try:
        if text.startswith(INLINE):
            return BytesIO(b64decode(text.removeprefix(INLINE).encode("ascii"), validate=True))
    except (binascii.Error, UnicodeEncodeError):
        pass
    raise InputError(f"region: {shown(text)} given; mask:{INLINE}... expected, in base64")


def _number(value: float, argument: str) -> float:
    """A fraction of the canvas, freed of rounding."""
    number = as_float(value) if is_number(value) else math.nan
    if not -SLACK <= number <= 1 + SLACK:  # false for NaN, too
        raise InputError(
            f"{argument}: {shown(value)} given; a fraction of the canvas, 0 to 1, expected"
        )
    return min(max(number, 0.0), 1.0)


def _size(value: float, argument: str) -> float:
    if (number := _number(value, argument)) <= 0:
        raise InputError(f"{argument}: {value!r} given; a number above 0, up to 1, expected")
    return number


def _points(points: Iterable[Sequence[float]], argument: str, least: int) -> Points:
    if not is_list(points) or not all(is_list(point) for point in points):
        raise InputError(f"{argument}: {shown(points)} given; a list of pairs (x, y) expected")
    pairs = [tuple(point) for point in points]
    if len(pairs) < least:
        raise InputError(f"{argument}: {len(pairs)} points given; {least} or more expected")
    for i, pair in enumerate(pairs):
        if len(pair) != 2:
            raise InputError(f"{argument} point {i}: {pair} given; a pair (x, y) expected")
    return tuple(
        (_number(x, f"{argument} point {i} x"), _number(y, f"{argument} point {i} y"))
        for i, (x, y) in enumerate(pairs)
    )
