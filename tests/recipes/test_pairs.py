"""Every two recipes on one pipeline: they run together, or are refused by name; no edit is lost.

A new recipe is added by a line in RECIPES.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from torch import Tensor

import hookctl
from hookctl import Editor, recipes
from hookctl.errors import ConflictError
from tests import zoo
from tests.families.subjects import error
from tests.recipes.pictures import picture

SD15 = zoo.PIPELINES["sd15"]
PROMPTS = ["a red cat", "a blue cat"]
LEFT, RIGHT, TOP = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.5)

# What makes each recipe act on the run that all of them share.
RECIPES: dict[str, Callable[[Any], Editor]] = {
    "AttendAndExcite": lambda r: r.AttendAndExcite(["cat"], refinements=1),
    "BoxDiff": lambda r: r.BoxDiff(["cat"], [LEFT], refinements=1),
    "FreeU": lambda r: r.FreeU(),
    "LayoutGuidance": lambda r: r.LayoutGuidance(["cat"], [LEFT], iterations=1, stop=0.5),
    "MasaCtrl": lambda r: r.MasaCtrl(PROMPTS, start=0.0, sites="self"),
    "MaskedSelfAttention": lambda r: r.MaskedSelfAttention([LEFT, RIGHT]),
    "MultiDiffusion": lambda r: r.MultiDiffusion(window=12, stride=4),
    "MultiInstanceSampler": lambda r: r.MultiInstanceSampler(["a dog"], [LEFT], share=0.5),
    "OneWayFlow": lambda r: r.OneWayFlow({"seed": TOP}, [("rest", "seed", -4.0)]),
    "PAG": lambda r: r.PAG(sites="self @1/2"),
    "PromptToPrompt": lambda r: r.PromptToPrompt(PROMPTS, self_replace=0.5, self_resolution=1.0),
    "ProximalGuidance": lambda r: r.ProximalGuidance(),
    "RegionalPrompts": lambda r: r.RegionalPrompts(["a dog"], [LEFT]),
    "SAG": lambda r: r.SAG(sites="self @1/2"),
    "SEG": lambda r: r.SEG(sites="self @1/2"),
    "ScaleU": lambda r: r.ScaleU(backbone=[0.3], skip=[-0.3]),
    "StyleAligned": lambda r: r.StyleAligned(PROMPTS),
}
NAMES = [name for name in RECIPES if name in recipes.__all__]

# Inversions of a picture, whose edits are drawn by a program under further editors.
INVERSIONS: dict[str, dict[str, Any]] = {
    "DDIMInversion": {},
    "DirectInversion": {},
    "EditFriendlyDDPM": {"skip": 0.0},
    "NegativePromptInversion": {},
    "NullTextInversion": {"iterations": 1},
}
BESIDE = ("FreeU", "MaskedSelfAttention", "PAG", "PromptToPrompt", "SAG", "SEG", "StyleAligned")

# Editors that need more than a prompt (a picture, a second model) have stacks in their own tests.
APART = {"ReferenceOnly", "RealCompo"}


@cache
def pipe() -> Any:
    return SD15.make()


def draw(*names: str) -> Tensor:
    with hookctl.control(pipe(), *(RECIPES[name](recipes) for name in names)):
        return SD15.run(pipe(), PROMPTS)


@cache
def alone(name: str) -> Tensor:
    return draw(name)


def test_every_editor_is_in_the_table() -> None:
    editors = {
        name
        for name in recipes.__all__
        if isinstance(getattr(recipes, name), type) and issubclass(getattr(recipes, name), Editor)
    }
    assert editors <= set(RECIPES) | APART


@pytest.mark.parametrize("name", NAMES)
def test_each_acts(name: str) -> None:
    assert error(alone(name), SD15.run(pipe(), PROMPTS)) > 1e-4


@pytest.mark.parametrize("pair", itertools.combinations(NAMES, 2), ids="-".join)
def test_pair(pair: tuple[str, str]) -> None:
    try:
        both = draw(*pair)
    except ConflictError as refusal:
        assert all(name in str(refusal) for name in pair)
        return
    for name, other in (pair, pair[::-1]):
        assert error(both, alone(other)) > 1e-5, f"nothing is left of {name} beside {other}"


@pytest.mark.parametrize("name", [name for name in INVERSIONS if name in recipes.__all__])
def test_inversions_under_editors(name: str) -> None:
    """Every editor changes what is drawn beside an inverted picture."""
    inversion = getattr(recipes, name)
    inverted = inversion(pipe(), picture(), PROMPTS[0], steps=2, **INVERSIONS[name]).run()

    def edited(*editors: Editor) -> Tensor:
        given = {"prompts": PROMPTS, "guidance": 4.0, "output_type": "latent"}
        latents: Tensor = inverted.edit(pipe(), *editors, **given)
        return latents

    alone = edited()
    for other in BESIDE:
        if other in NAMES:
            assert error(edited(RECIPES[other](recipes)), alone) > 1e-5, other


@pytest.mark.parametrize("other", ["MultiInstanceSampler", "SEG", "SAG", "FreeU", "PromptToPrompt"])
def test_guidance_is_added_in_any_order(other: str) -> None:
    if other in NAMES:
        assert error(draw("PAG", other), draw(other, "PAG")) < 1e-4


def test_nothing_stays_behind() -> None:
    assert error(SD15.run(pipe(), PROMPTS), SD15.run(SD15.make(), PROMPTS)) == 0
