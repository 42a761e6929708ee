"""Places: what the canvas says, what a stack writes, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hookctl.address.regions import parse_region
from hookctl.app.places import GRID, Box, Painted, bounds, place_of, read_place


def painted(rows: slice, columns: slice, text: str = "") -> Painted:
    cells = np.zeros((GRID, GRID), dtype=bool)
    cells[rows, columns] = True
    edges = np.flatnonzero(np.diff(cells.flatten(), prepend=False, append=False))
    return Painted(tuple(np.diff([0, *edges, cells.size]).tolist()), text)


LEFT = painted(slice(0, GRID), slice(0, GRID // 2), "a cat")


def test_a_mask_is_a_region_of_its_own() -> None:
    region = parse_region(LEFT.area)
    assert region.coverage(4, 4).tolist() == [[1, 1, 0, 0]] * 4
    assert LEFT.mask.size == (GRID, GRID) and len(LEFT.area) < 1000
    assert bounds(LEFT.area) == [0, 0, 0.5, 1] == bounds("box:0,0,0.5,1")


@pytest.mark.parametrize(
    "place",
    [
        LEFT,
        painted(slice(3, 9), slice(0, GRID), "to the end of its rows"),
        painted(slice(0, GRID), slice(0, GRID), "all"),
        painted(slice(GRID - 1, GRID), slice(GRID - 1, GRID), "the last cell"),
        Box(0.1, 0.2, 0.5, 0.75, "a dog"),
    ],
)
def test_places_survive_the_canvas_and_the_file(place: Any) -> None:
    assert place_of(place.data()) == place
    assert read_place(place.area, place.text) == place


@pytest.mark.parametrize(
    "drawn",
    [
        None, {}, {"runs": []}, {"runs": "x"}, {"runs": [GRID * GRID]}, {"runs": [0, 5]},
        {"runs": [-1, GRID * GRID + 1]}, {"runs": [0.0, GRID * GRID]}, {"runs": [True] * 9},
        {"runs": [1] * (GRID * GRID + 2)},
        {"x0": 0, "y0": 0, "x1": 0.001, "y1": 1}, {"x0": "a", "y0": 0, "x1": 1, "y1": 1},
    ],
)  # fmt: skip
def test_what_is_no_place_is_left_out(drawn: Any) -> None:
    assert place_of(drawn) is None


def test_other_areas_are_no_places_of_the_page() -> None:
    for area in ("full", "mask:/some/file.png", "mask:data:image/png;base64,AAAA", None, [1, 2]):
        assert read_place(area) is None
