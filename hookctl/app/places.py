"""Places on the picture, drawn by mouse: boxes and painted masks, and what belongs in each."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from hookctl.address.regions import INLINE, parse_region
from hookctl.errors import InputError

LEAST = 0.01  # of the picture: a box with a shorter side is a slip of the hand
MOST = 16  # places
GRID = 128  # cells of a painted mask, along each side
_LETTERS = 200  # of a text, at most


@dataclass(frozen=True)
class Box:
    """A box, in fractions of the picture's sides, and what belongs there."""

    x0: float
    y0: float
    x1: float
    y1: float
    text: str = ""

    @property
    def area(self) -> str:
        """As `hookctl.Region` reads it, to a thousandth."""
        return "box:" + ",".join(f"{round(x, 3):g}" for x in (self.x0, self.y0, self.x1, self.y1))

    def data(self) -> dict[str, Any]:
        """What the canvas draws it by."""
        sides = {"x0": self.x0, "y0": self.y0, "x1": self.x1, "y1": self.y1}
        return {**sides, "text": self.text}


@dataclass(frozen=True)
class Painted:
    """A mask painted by hand, and what belongs there.

    runs: how many cells lie outside, inside, outside ... of it, row by row of a grid of `GRID` a
    side that is stretched over the picture.
    """

    runs: tuple[int, ...]
    text: str = ""

    @property
    def mask(self) -> Image.Image:
        """White inside, of mode "1"."""
        cells = np.zeros(GRID * GRID, dtype=bool)
        ends = list(accumulate(self.runs))
        for start, stop in zip(ends[::2], ends[1::2], strict=False):
            cells[start:stop] = True
        return Image.fromarray(cells.reshape(GRID, GRID))

    @property
    def area(self) -> str:
        """As `hookctl.Region` reads it, the mask written out, so that no file need go along."""
        file = BytesIO()
        self.mask.save(file, "PNG")
        return f"mask:{INLINE}{b64encode(file.getvalue()).decode()}"

    def data(self) -> dict[str, Any]:
        """What the canvas draws it by."""
        return {"runs": list(self.runs), "text": self.text}


Place: TypeAlias = Box | Painted


def place_of(drawn: Any) -> Place | None:
    """What the canvas says of a place; None for what is none."""
    if not isinstance(drawn, Mapping):
        return None
    text = str(drawn.get("text") or "")[:_LETTERS]
    if "runs" in drawn:
        return _painted(drawn["runs"], text)
    try:
        x0, y0, x1, y1 = (min(max(float(drawn[k]), 0.0), 1.0) for k in ("x0", "y0", "x1", "y1"))
    except (KeyError, TypeError, ValueError):
        return None
    return Box(x0, y0, x1, y1, text) if x1 - x0 >= LEAST and y1 - y0 >= LEAST else None


def _painted(runs: Any, text: str) -> Painted | None:
    if not isinstance(runs, list) or len(runs) > GRID * GRID + 1:
        return None
    if not all(type(n) is int and 0 <= n <= GRID * GRID for n in runs):
        return None
    return Painted(tuple(runs), text) if sum(runs) == GRID * GRID and any(runs[1::2]) else None


def read_place(area: Any, text: Any = "") -> Place | None:
    """The place that a stack writes as an area; None for one that is neither box nor mask."""
    text = text if isinstance(text, str) else ""
    if isinstance(area, str) and area.startswith(f"mask:{INLINE}"):
        try:
            cells = parse_region(area).coverage(GRID, GRID).numpy().flatten() >= 0.5
        except InputError:
            return None
        return Painted(_runs(cells), text)
    numbers = area.removeprefix("box:").split(",") if isinstance(area, str) else area
    try:
        x0, y0, x1, y1 = (float(x) for x in numbers)
    except (TypeError, ValueError):
        return None
    return Box(x0, y0, x1, y1, text)


def _runs(cells: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """`Painted.runs` of cells, row by row."""
    edges = np.flatnonzero(np.diff(cells, prepend=False, append=False))
    return tuple(np.diff([0, *edges, len(cells)]).tolist())


def joined(areas: Sequence[str]) -> str:
    """The area that several make together; of several, to a cell of `GRID`."""
    if len(areas) == 1:
        return areas[0]
    found = [parse_region(area).coverage(GRID, GRID).numpy().flatten() >= 0.5 for area in areas]
    return Painted(_runs(np.logical_or.reduce(found))).area


def bounds(area: str) -> list[float]:
    """[x0, y0, x1, y1] of the smallest box around an area, as fractions."""
    inside = parse_region(area).coverage(GRID, GRID) > 0
    if area.startswith("box:"):
        return [float(x) for x in area.removeprefix("box:").split(",")]
    sides = [inside.any(axis).nonzero().flatten() for axis in (0, 1)]
    (x0, x1), (y0, y1) = ((float(s[0]) / GRID, float(s[-1] + 1) / GRID) for s in sides)
    return [x0, y0, x1, y1]
