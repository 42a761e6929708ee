"""Sets, maps of change and schedules of prompts: what is judged, and every figure is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hookctl.demos import further
from hookctl.demos.inversion import images_of
from hookctl.demos.models import opened
from hookctl.demos.shapes.render import drawn
from hookctl.demos.shapes.world import Scene, Thing

STAR, BALL, BOX = Thing("star", "red"), Thing("circle", "blue"), Thing("square", "green")


def at(thing: Thing, x: int, y: int) -> Thing:
    return replace(thing, centre=(x, y))


def test_consistency() -> None:
    one = further.Set(STAR, (BALL, BOX))
    assert one.prompts == [
        "a striped red star",
        "a red star above a blue circle",
        "a red star left of a green square",
    ]
    striped = replace(STAR, pattern="striped")
    alike = [Scene((at(striped, 64, 64),), "gray")]
    alike += [Scene((at(striped, 64, 32), at(BALL, 64, 96)), "gray")]
    alike += [Scene((at(striped, 32, 64), at(BOX, 96, 64)), "gray")]
    assert set(further.consistency([one], [drawn(alike)]).values()) == {1.0}
    alike[2] = Scene((at(STAR, 32, 64),), "white")
    found = further.consistency([one], [drawn(alike)])
    assert found["striped"] == 0.5 and found["one background"] == 0
    assert found["right"] == pytest.approx(2 / 3)


def test_change_map() -> None:
    rng = np.random.default_rng(3)
    case = further.draw("colour", rng)
    (image,) = images_of([case], rng)
    hard, soft = (further.change_map(image, case, fall) for fall in (0.0, 0.2))
    assert set(np.unique(hard)) == {0.0, 1.0}
    assert (soft >= hard).all() and ((0 < soft) & (soft < 1)).any() and soft.min() == 0


@pytest.mark.slow  # a dozen short runs
@pytest.mark.parametrize("model", ["shapes", "shapes-flow"])
def test_every_figure(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(further, "STEPS", 6)
    flow = model == "shapes-flow"
    pipe = opened(model)
    pipe.set_progress_bar_config(disable=True)
    methods = further.SETS_ON_FLOW if flow else further.SETS
    sets, rows = further.of_sets(pipe, 1, methods)
    assert list(sets) == list(methods) and len(rows[0]) == 3 * len(methods)
    assert all(0 <= value <= 1 for figures in sets.values() for value in figures.values())
    monkeypatch.setattr(further, "judged", lambda *three: {"cases": float(len(three[0]))})
    edits, rows = further.of_edits(pipe, 1)
    assert list(edits)[1::2] == ["DifferentialDiffusion", "PromptSchedule"] and len(rows[0]) == 6
