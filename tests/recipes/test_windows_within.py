"""Editors whose own windows meet no step of a run say so, however they are made."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hookctl import Editor, control, recipes
from hookctl.errors import HoleError
from tests import zoo
from tests.recipes.runs import SD15, TWO, made

CATS = ["a red cat", "a blue cat"]
# Of a run of one step.
WITHOUT_A_STEP: dict[str, Callable[[], Editor]] = {
    "ConsiStory": lambda: recipes.ConsiStory(CATS, "cat", sites="self"),  # it has no masks yet
    "MasaCtrl": lambda: recipes.MasaCtrl(CATS, start=0.0, stop=0.5),
    "PlugAndPlay": lambda: recipes.PlugAndPlay(CATS, feature_stop=0.5, query_stop=0.4),
    "PromptToPrompt": lambda: recipes.PromptToPrompt(CATS, cross_replace=0.3, self_replace=0.2),
    "StyleAligned": lambda: recipes.StyleAligned(CATS, start=0.5, stop=0.9),
}


@pytest.mark.parametrize("name", WITHOUT_A_STEP)
def test_a_run_of_one_step(name: str) -> None:
    session = control(made("sd15"), WITHOUT_A_STEP[name]())
    with pytest.raises(HoleError, match=f"{name} changed nothing"), session:
        SD15.run(made("sd15"), CATS, steps=1)
    assert f"{name} never acted" in session.report()


def test_what_can_do_nothing_is_not_told_of() -> None:
    nothing = [
        recipes.MasaCtrl(TWO, start=0.5, stop=0.5),
        recipes.PromptToPrompt(TWO, cross_replace=0.0, self_replace=0.0),
        recipes.StyleAligned(TWO, adain=False, share=False),
    ]
    assert all(editor.neutral() for editor in nothing)
    for editor in nothing:
        with control(made("sd15"), editor):
            zoo.PIPELINES["sd15"].run(made("sd15"), TWO, steps=1)
