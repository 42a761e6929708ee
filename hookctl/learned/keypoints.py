"""The picture of a face's five points that IdentityNet was trained with.

Wang et al., "InstantID", arXiv 2401.07519. Both eyes and both corners of the mouth are joined with
the nose by thin ellipses, at 0.6 of their brightness, and all five are discs over them. Sizes are
in pixels and do not grow with the face, so points are scaled and then drawn, never the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

# Eye, eye (the left one in the picture first), nose, corner and corner of the mouth.
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
THICKNESS = 4  # half of a limb's, px
RADIUS = 10  # of a point, px
DIMMED = 0.6


def draw_keypoints(
    faces: Sequence[Sequence[Sequence[float]]], width: int, height: int
) -> Image.Image:
    """Draw faces on black.

    faces: of each its five points (x, y), in pixels of the picture; width, height: of it.
    """
    canvas: Pixels = np.zeros((height, width, 3), np.uint8)
    for points in faces:
        for first, second in LIMBS:
            _fill(canvas, _limb(points[first], points[second]), COLOURS[first])
    canvas = (canvas * DIMMED).astype(np.uint8)
    for points in faces:
        for (x, y), colour in zip(points, COLOURS, strict=True):
            _fill(canvas, _disc(int(x), int(y)), colour)
    return Image.fromarray(canvas)


def _fill(canvas: Pixels, outline: Iterator[tuple[int, int]], colour: tuple[int, ...]) -> None:
    """Fill what lies, row by row, between the outermost points (x, y) of a convex outline."""
    rows: dict[int, tuple[int, int]] = {}
    for x, y in outline:
        left, right = rows.get(y, (x, x))
        rows[y] = min(left, x), max(right, x)
    for y, (left, right) in rows.items():
        if 0 <= y < canvas.shape[0] and right >= 0:
            canvas[y, max(left, 0) : right + 1] = colour


def _limb(first: Sequence[float], second: Sequence[float]) -> Iterator[tuple[int, int]]:
    """The outline of an ellipse along the line between two points, by its whole degrees."""
    (x0, y0), (x1, y1) = first, second
    centre = int((x0 + x1) / 2), int((y0 + y1) / 2)
    length = int(math.hypot(x0 - x1, y0 - y1) / 2)
    angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
    cos, sin = _sine(90 + angle), _sine(angle)
    corners = []
    for degree in range(361):
        x, y = length * _sine(90 + degree), THICKNESS * _sine(degree)
        corners.append((round(centre[0] + x * cos - y * sin), round(centre[1] + x * sin + y * cos)))
    for start, end in zip(corners, corners[1:], strict=False):
        yield from _line(start, end)


def _sine(degrees: int) -> float:
    """As precise as the table that the official pictures were drawn by."""
    return float(np.float32(round(math.sin(math.radians(degrees)), 7)))


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The pixels of one side of a filled polygon, both ends among them."""
    (x0, y0), (x1, y1) = sorted((start, end), key=lambda point: point[0])
    steps = max(abs(x1 - x0), abs(y1 - y0), 1)
    for i in range(steps + 1):  # the side itself, from the left, halves staying behind
        yield x0 + _part(x1 - x0, i, steps), y0 + _part(y1 - y0, i, steps)
    for y in range(min(y0, y1), max(y0, y1)):  # what is filled beside it, halves to the right
        rows = abs(y1 - y0)
        yield x0 + ((x1 - x0) * abs(y - y0) * 2 + rows) // (2 * rows), y


def _part(whole: int, i: int, steps: int) -> int:
    """whole * i / steps, rounded to the nearest, a half towards 0."""
    nearest = (2 * abs(whole) * i + steps - 1) // (2 * steps)
    return nearest if whole >= 0 else -nearest


def _disc(x: int, y: int) -> Iterator[tuple[int, int]]:
    """The outline of a disc, by the midpoint circle: eight points at a time."""
    error, along, across = 0, RADIUS, 0
    grow, shrink = 1, 2 * RADIUS - 1
    while along >= across:
        for dx, dy in ((along, across), (across, along)):
            for sx, sy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                yield x + sx * dx, y + sy * dy
        across += 1
        error += grow
        grow += 2
        if error > 0:
            error -= shrink
            along -= 1
            shrink -= 2
