"""Where instances are, as the numbers that tokenizers read.

Places are fractions of the canvas, x to the right and y down, as in `address.regions`, which reads
them. Of a mask InstanceDiffusion (arXiv 2402.03290) takes 256 points, half on its contour and half
inside; where the official code draws random pixels, these are evenly spread ones, so that the same
mask always gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hookctl.address.outlines import Array, Stroke
from hookctl.address.outlines import Box as BoxOutline
from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.arguments import is_list, refusal
from hookctl.errors import InputError

Point = tuple[float, float]
Box = tuple[float, float, float, float]

# Sides of a pixel, clockwise from the top: where what is beyond lies, (down, right). Walking round
# with the mask to the right hand, one goes along a side in the direction of the next one's.
_BEYOND = ((-1, 0), (0, 1), (1, 0), (0, -1))


def box_of(given: Any, name: str) -> Box:
    """(x0, y0, x1, y1) of a box, however it is written. Raises InputError."""
    wanted = "a box (x0, y0, x1, y1), fractions of the canvas"
    if getattr(given, "ndim", 2) == 1:  # no mask, as arrays are elsewhere
        raise refusal(name, given, wanted)
    region = region_of(given, name)
    outline = region.outline
    if not isinstance(outline, BoxOutline):
        raise refusal(name, given, wanted)
    return outline.x0, outline.y0, outline.x1, outline.y1


def point_of(given: Any, name: str) -> Point:
    """(x, y). Raises InputError."""
    if not is_list(given) or len(given) != 2:
        raise refusal(name, given, "a point (x, y), fractions of the canvas")
    return _stroke([given], name)[0]


def scribble_of(given: Any, count: int, name: str) -> Array:
    """A stroke as points at even distances, [count, 2], those nearest to (0, 0) first, as in
    training. Raises InputError."""
    if not is_list(given) or len(given) < 2:
        raise refusal(name, given, "a stroke [(x, y), (x, y), ...] of two points or more")
    return nearest_first(resampled(np.array(_stroke(given, name)), count))


def mask_of(given: RegionLike, side: int, name: str) -> Array:
    """The pixels of a square canvas that a mask or region covers at least by half, bool
    [side, side]. Raises InputError."""
    covered = region_of(given, name).tokens(side, side).numpy()
    mask: Array = covered.reshape(side, side)
    return mask


def _stroke(points: Sequence[Any], name: str) -> Sequence[Point]:
    """Points, checked."""
    try:
        region = Region.point(*points[0]) if len(points) == 1 else Region.scribble(points)
    except (InputError, TypeError) as error:
        raise InputError(f"{name}: {error}") from None
    assert isinstance(region.outline, Stroke)
    return region.outline.points


def centre(box: Box) -> Point:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def resampled(points: Array, count: int) -> Array:
    """Points at even distances along a line through `points`, ends included, [count, 2]."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0.0], steps.cumsum()])
    at = np.linspace(0, along[-1], count)
    return np.stack([np.interp(at, along, axis) for axis in points.T], axis=1)


def nearest_first(points: Array) -> Array:
    """Points by their distance to (0, 0)."""
    ordered: Array = points[np.argsort(np.hypot(*points.T), kind="stable")]
    return ordered


# -- masks -----------------------------------------------------------------------------------------


def box_of_mask(mask: Array) -> Box:
    """The bounding box of the set pixels of [height, width]."""
    (y, x), (height, width) = np.nonzero(mask), mask.shape
    return (
        float(x.min() / width),
        float(y.min() / height),
        float((x.max() + 1) / width),
        float((y.max() + 1) / height),
    )


def points_of_mask(mask: Array, count: int) -> Array:
    """Half of the points on the contour and half inside, nearest to (0, 0) first, [count, 2].

    On the contour: of all contours in a line, at even distances. Inside: the pixels by their
    distance to their mean, cut into as many parts as there are points, the middle one of each.
    """
    contour = np.concatenate(list(contours(mask)))
    on = contour[np.linspace(0, len(contour) - 1, count // 2).astype(int)]
    pixels = np.argwhere(mask).astype(float)
    pixels = pixels[np.argsort(np.hypot(*(pixels - pixels.mean(0)).T), kind="stable")]
    inside = pixels[_middles(len(pixels), count - count // 2)]
    return nearest_first(_fractions(np.concatenate([on, inside]), mask))


def scribble_of_mask(mask: Array, count: int) -> Array:
    """Points inside, nearest to (0, 0) first, [count, 2]: what training takes for a scribble."""
    pixels = nearest_first(_fractions(np.argwhere(mask).astype(float), mask))
    return pixels[_middles(len(pixels), count)]


def _middles(pixels: int, count: int) -> Array:
    """The middle of each of `count` equal parts of a list; with repeats if the list is shorter."""
    return ((np.arange(count) + 0.5) * pixels / count).astype(int)


def _fractions(pixels: Array, mask: Array) -> Array:
    """(row, column) of pixels as (x, y)."""
    points: Array = (pixels[:, ::-1] / mask.shape[::-1]).clip(0, 1)
    return points


def contours(mask: Array) -> Iterator[Array]:
    """The closed contours of a mask [height, width], each [points, 2] of (row, column).

    They go through the pixels just outside, clockwise round what is set (holes the other way), and
    end where they begin: the level set at 0 of marching squares. Pixels that touch only by a corner
    are apart.
    """
    padded = np.pad(mask.astype(bool), 1)
    todo = {(y, x) for y, x in np.argwhere(padded[1:] & ~padded[:-1]) + (1, 0)}
    for start in sorted(todo):
        if start in todo:
            walked = list(_walked(padded, start, todo))
            if len(walked) > 1:  # round a hole of one pixel there is nowhere to go
                yield np.array(walked) - 1.0


def _walked(mask: Array, start: tuple[int, int], todo: set[tuple[int, int]]) -> Iterator[Any]:
    """The pixels beyond the mask on a walk along its border, from the top side of a pixel."""
    y, x = start
    side, last = 0, None
    while True:
        if side == 0:
            todo.discard((y, x))
        down, right = _BEYOND[side]
        beyond = y + down, x + right
        if beyond != last:
            yield beyond
        last = beyond
        forward, across = _BEYOND[(side + 1) % 4]
        if not mask[y + forward, x + across]:  # round the corner of this pixel
            side = (side + 1) % 4
        elif not mask[y + forward + down, x + across + right]:
            y, x = y + forward, x + across
        else:
            y, x, side = y + forward + down, x + across + right, (side - 1) % 4
        if (y, x) == start and side == 0:
            break
    if last != (start[0] - 1, start[1]):
        yield start[0] - 1, start[1]
