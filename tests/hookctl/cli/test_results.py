"""What a run leaves behind: titles that say which word, regions, and the bar of a row's scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hookctl
from hookctl.cli.results import Results, _regions
from hookctl.inspect import show
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator
from hookctl.recipes import LayoutGuidance, RegionalPrompts
from tests.recipes.images import pipeline

BOXES = ["box:0,0,0.5,1", "box:0.5,0,1,1"]


class Drawn(list[Any]):
    """The arguments of every grid that was drawn."""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    found, true = Drawn(), show.grid

    def grid(rows: Any, **given: Any) -> Image.Image:
        found.append({"rows": rows, **given})
        return true(rows, **given)

    monkeypatch.setattr(show, "grid", grid)
    return found


def results(prompts: Sequence[str], *editors: Any, words: Sequence[str], **more: Any) -> Results:
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    maps = [hookctl.Maps(*words)] if words else []
    with hookctl.control(pipe, *editors, *maps) as session:
        images = pipe(list(prompts), num_inference_steps=2).images
    return Results(prompts, 1, images, more.pop("edited", images), [session], words, **more)


def test_titles_say_which_word(drawn: Drawn, tmp_path: Path) -> None:
    results(["a red cat", "a red dog", "a blue dog"], words=["dog", "blue"]).save(tmp_path)
    (grid,) = drawn
    titles = ["source", "plain re-prompt", "edited", "map of 'dog'", "map of 'blue'"]
    assert grid["column_titles"] == titles and grid["row_titles"] == ["a red dog", "a blue dog"]
    first, second = grid["rows"]
    assert first[-1] is None and all(second)  # a map stands under its word
    assert all(low == 0 < high for low, high in grid["scales"])
    assert Image.open(tmp_path / "grid.png").width <= 1600
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_several_images_of_a_program_are_told_apart(drawn: Drawn) -> None:
    made = results(["a cat"], words=[])
    several = Results(
        ["a cat"], 1, made.plain, [*made.plain] * 2, made.sessions, titles=["alpha 0", "alpha 1"]
    )
    several.grid()
    assert drawn[-1]["column_titles"] == ["plain", "alpha 0", "alpha 1"]


@pytest.mark.parametrize("words", [["cat"], []])
def test_regions_are_drawn(drawn: Drawn, words: list[str]) -> None:
    """On the maps, or on the edited image where there are none."""
    regional = RegionalPrompts(["a cat", "a dog"], BOXES)
    made = results(["a cat and a dog"], regional, words=words)
    assert len(_regions(made.sessions[0], 0)) == 2
    made.grid()
    assert drawn[-1]["column_titles"][-1] == ("map of 'cat'" if words else "regions")
    shown = np.asarray(drawn[-1]["rows"][0][-1])
    assert (shown[128] == show.OF_REGIONS).all(-1).any()


def test_a_region_of_several_editors_is_drawn_once() -> None:
    editors = [LayoutGuidance(["cat", "dog"], BOXES), RegionalPrompts(["a cat", "a dog"], BOXES)]
    session = hookctl.control(pipeline(), *editors)
    assert len(_regions(session, 0)) == 2


def test_influence_maps_are_written(tmp_path: Path) -> None:
    edit = CollaborativeDiffusion(
        [Collaborator("one"), Collaborator("other", lambda x, *_: x[:, :1])]
    )
    results(["a red cat", "a red dog"], edit, words=[]).save(tmp_path)
    sheets = [Image.open(tmp_path / f"influence-{i}.png") for i in range(2)]
    assert sheets[0].tobytes() != sheets[1].tobytes()
