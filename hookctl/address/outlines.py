"""The geometry below `regions`: how much of each grid cell an outline covers.

Each outline answers two questions about a grid of square cells laid over the canvas: `coverage`,
float64 [height, width], the share of each cell inside; and `inside`, bool [height, width], whether
the centre of each cell is inside. Inputs are taken as valid: `regions` checks them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Points: TypeAlias = tuple[tuple[float, float], ...]

FINE = 512  # samples along the longer side of the canvas, at least
ROWS = 8  # sample rows per strip of a polygon; its area is exact with one
THINNEST = 0.75  # radius in cells; above 1 / sqrt(2), any disc contains the centre of a cell


class Outline(Protocol):
    """A shape on the unit canvas."""

    def coverage(self, height: int, width: int) -> Array: ...

    def inside(self, height: int, width: int) -> Array: ...


def centres(n: int) -> Array:
    """The middles of n equal cells of [0, 1], [n]."""
    return (np.arange(n) + 0.5) / n


def overlap(low: Array, high: Array, n: int) -> Array:
    """The share of each of n cells of [0, 1] that lies in [low, high], [..., n]."""
    edges = np.arange(n + 1) / n
    ends = np.minimum(high[..., None], edges[1:]) - np.maximum(low[..., None], edges[:-1])
    return ends.clip(min=0) * n


def samples(height: int, width: int) -> int:
    """How many samples to take along each side of a cell."""
    return max(4, math.ceil(FINE / max(height, width)))


def pooled(fine: Array, height: int, width: int) -> Array:
    """The mean of samples [height * n, width * n] over each cell, [height, width]."""
    means: Array = fine.reshape(height, -1, width, fine.shape[1] // width).mean((1, 3))
    return means


@dataclass(frozen=True)
class Box:
    """The rectangle [x0, x1) by [y0, y1); exact."""

    x0: float
    y0: float
    x1: float
    y1: float

    def coverage(self, height: int, width: int) -> Array:
        rows = overlap(np.array(self.y0), np.array(self.y1), height)
        return np.outer(rows, overlap(np.array(self.x0), np.array(self.x1), width))

    def inside(self, height: int, width: int) -> Array:
        y, x = centres(height), centres(width)
        return np.outer((y >= self.y0) & (y < self.y1), (x >= self.x0) & (x < self.x1))


@dataclass(frozen=True)
class Stroke:
    """All within `radius` of a line through points (a disc, if one); in shorter sides.

    A stroke thinner than the samples is drawn thick enough to meet them everywhere, and its
    coverage is scaled down by as much: it fades, it never breaks.
    """

    points: Points
    radius: float

    def coverage(self, height: int, width: int) -> Array:
        n = samples(height, width)
        radius = self.radius * min(height, width) * n
        drawn = max(radius, THINNEST)
        soft = (drawn + 0.5 - self.distance(height * n, width * n, drawn + 0.5)).clip(0, 1)
        faded = (radius / drawn) ** (1 if len(self.points) > 1 else 2)
        return pooled(soft, height, width) * faded

    def inside(self, height: int, width: int) -> Array:
        drawn = max(self.radius * min(height, width), THINNEST)
        return self.distance(height, width, drawn) <= drawn

    def distance(self, height: int, width: int, most: float) -> Array:
        """From each centre to the line, in cells [height, width]; infinite beyond `most`."""
        points = np.array(self.points) * (width, height) - 0.5  # in cells, centres at integers
        result = np.full((height, width), np.inf)
        for a, b in zip(points, points[1:] if len(points) > 1 else points, strict=False):
            left, top = np.floor(np.minimum(a, b) - most).astype(int).clip(0)
            right, bottom = np.ceil(np.maximum(a, b) + most).astype(int) + 1
            x = np.arange(left, min(right, width))[None, :] - a[0]
            y = np.arange(top, min(bottom, height))[:, None] - a[1]
            dx, dy = b - a
            along = ((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12)).clip(0, 1)
            part = result[top:bottom, left:right]
            np.minimum(part, np.hypot(x - along * dx, y - along * dy), out=part)
        return result


@dataclass(frozen=True)
class Polygon:
    """The inside of a closed outline by the even-odd rule."""

    points: Points

    def crossings(self, y: Array) -> Array:
        """Where horizontal lines cross the outline: x in rising order, pairs open and close the
        inside, infinity after the last, [lines, even number]."""
        a = np.array(self.points)
        b = np.roll(a, -1, axis=0)
        up = b[:, 1] - a[:, 1]
        met = (a[:, 1] <= y[:, None]) != (b[:, 1] <= y[:, None])  # [lines, edges]
        slope = (b[:, 0] - a[:, 0]) / np.where(up == 0, 1, up)
        x = np.where(met, a[:, 0] + (y[:, None] - a[:, 1]) * slope, np.inf)
        return np.sort(x, axis=1)[:, : max(2, met.sum(1).max(initial=0))]

    def coverage(self, height: int, width: int) -> Array:
        # between the cell edges and corners in y, all edges are straight and the midpoint rule
        # gives the exact area, however thin the polygon
        corners = np.array([y for _, y in self.points])
        cuts = np.unique(np.concatenate([np.arange(height + 1) / height, corners]))
        cuts = cuts[(cuts >= corners.min()) & (cuts <= corners.max())]
        fine = cuts[:-1, None] + np.diff(cuts)[:, None] * centres(ROWS)
        weight = np.repeat(np.diff(cuts) * height / ROWS, ROWS)  # in cells
        y = fine.flatten()
        x = np.where(np.isinf(crossed := self.crossings(y)), 2.0, crossed)
        spans = overlap(x[:, 0::2], x[:, 1::2], width).sum(1)  # [lines, width]
        result = np.zeros((height, width))
        np.add.at(result, (y * height).astype(int).clip(0, height - 1), spans * weight[:, None])
        return result

    def inside(self, height: int, width: int) -> Array:
        result = np.zeros((height, width), dtype=bool)
        x = centres(width)
        for crossed in self.crossings(centres(height)).T:
            result ^= crossed[:, None] <= x
        return result


@dataclass(frozen=True, eq=False)
class Mask:
    """An image stretched over the canvas: values [rows, columns] from 0 to 1; exact."""

    values: Array

    def coverage(self, height: int, width: int) -> Array:
        rows, columns = (
            overlap(np.arange(n) / n, np.arange(1, n + 1) / n, m).T  # [m, n]
            for n, m in zip(self.values.shape, (height, width), strict=True)
        )
        covered: Array = rows @ self.values @ columns.T
        return covered

    def inside(self, height: int, width: int) -> Array:
        y, x = (
            (centres(m) * n).astype(int)
            for n, m in zip(self.values.shape, (height, width), strict=True)
        )
        inside: Array = self.values[np.ix_(y, x)] >= 0.5
        return inside


@dataclass(frozen=True)
class Combined:
    """Outlines joined by set operations, point by point: a & ~a is empty, a | ~a is full.

    `operation`: "or" (any), "and" (all), "not" (outside all).
    """

    operation: str
    parts: tuple[Outline, ...]

    def coverage(self, height: int, width: int) -> Array:
        n = samples(height, width)
        return pooled(self.inside(height * n, width * n), height, width)

    def inside(self, height: int, width: int) -> Array:
        first, *others = (part.inside(height, width) for part in self.parts)
        for other in others:
            first = first & other if self.operation == "and" else first | other
        return ~first if self.operation == "not" else first
