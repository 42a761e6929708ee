"""Every recipe on every family acts, or says why not; as docs/recipe_families.md has it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.families.cells import FAMILIES, Cells, recipe_names, verdict
from tests.hookctl.loop.families import BY_NAME

PAGE = Path(__file__).parents[2] / "docs/recipe_families.md"
# One of each kind: an added row, a rule, an energy, latents, texts, positions, a program, refusals.
EVERYDAY = {
    ("PAG", "FLUX.1"),
    ("APG", "SD3"),
    ("AttendAndExcite", "Wan"),
    ("DifferentialDiffusion", "Z-Image"),
    ("PromptSchedule", "Qwen-Image"),
    ("DyPE", "klein"),
    ("RFInversion", "SD3"),
    ("FreeU", "LTX"),
    ("FlowEdit", "SD 1.5"),
}
CELLS = [
    pytest.param(
        name,
        family,
        id=f"{name}-{family}",
        marks=() if (name, family) in EVERYDAY else pytest.mark.conformance,
    )
    for name in recipe_names()
    for family in FAMILIES
]


def written() -> dict[tuple[str, str], str]:
    """(recipe, family) -> the mark of the page."""
    found: dict[tuple[str, str], str] = {}
    heads: list[str] = []
    for line in PAGE.read_text("utf-8").partition("## Why not")[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == "recipe":
            heads = cells[1:]
        elif line.startswith("|") and not set(cells[0]) <= set("-: "):
            found |= {(cells[0], head): mark for head, mark in zip(heads, cells[1:], strict=True)}
    return found


@cache
def cells(family: str) -> Cells:
    return Cells(BY_NAME[FAMILIES[family]])


@pytest.mark.parametrize(("name", "family"), CELLS)
def test_it_acts_or_says_why_not(name: str, family: str) -> None:
    mark, reason = verdict(cells(family), name)
    assert mark != "✗", reason
    assert mark == written().get((name, family), mark), reason


def test_the_page_has_no_silent_cell() -> None:
    marks = written()
    assert len(marks) >= 12 * 30
    assert set(marks.values()) <= {"✓", "–"}
