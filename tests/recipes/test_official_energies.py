"""Attend-and-Excite, BoxDiff and layout guidance with paper=True against the official loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LMSDiscreteScheduler
from torch import Tensor

from hookctl import control
from hookctl.address.regions import Region
from hookctl.address.text import TextLayout
from hookctl.recipes import AttendAndExcite, BoxDiff, LayoutGuidance
from tests.marks import examples
from tests.recipes import literal_energies as literal
from tests.recipes.runs import SD15, made, relative, with_scheduler

PROMPTS = ["a red cat above a blue square", "a blue dog"]
WORDS = [["cat", "square"], ["dog"]]
STEPS = 6
TOLERANCE = 1e-11  # float64, through a few dozen steps


def indices(pipe: Any, prompt: int) -> list[list[int]]:
    text = TextLayout(pipe).read(PROMPTS[prompt])
    return [list(text.find(word)) for word in WORDS[prompt]]


def tokens(pipe: Any, prompt: int) -> list[int]:
    return [i for word in indices(pipe, prompt) for i in word]


def drawn(pipe: Any, *editors: Any, steps: int = STEPS) -> Tensor:
    with control(pipe, *editors):
        return SD15.run(pipe, PROMPTS, steps=steps)


# Step 5 lies beyond max_iter = 3, where no step is updated any more.
SOME = {0: 0.05, 2: 0.2, 5: 0.2}


@pytest.mark.parametrize("thresholds", examples([{}, SOME, {0: 0.99}], [SOME]))
def test_attend_and_excite(thresholds: dict[int, float]) -> None:
    pipe = made("sd15", torch.float64)
    shares = {(step + 0.5) / STEPS: value for step, value in thresholds.items()}
    edit = AttendAndExcite(WORDS, thresholds=shares, refinements=7, scale=400.0, paper=True)
    got, taken = drawn(pipe, edit), []
    with literal.Model(pipe).written_out() as model:
        for i, prompt in enumerate(PROMPTS):
            want, rounds = literal.excited(
                model, prompt, tokens(pipe, i), literal.excite,
                thresholds=thresholds, seed=i, scale=400.0, most=7,
            )  # fmt: skip
            taken += rounds
            assert relative(got[i], want[0]) < TOLERANCE
    if thresholds and 5 in thresholds:
        assert any(1 < n < 7 for n in taken)  # a threshold was reached


OF_BOXES = {0: 0.03, 2: 0.06, 5: 0.2}
BOXES = [[(0.1, 0.2, 0.7, 0.9), (0.4, 0.0, 1.0, 0.6)], [(0.05, 0.3, 0.9, 0.95)]]


@pytest.mark.parametrize("thresholds", examples([{}, OF_BOXES], [OF_BOXES]))
def test_box_diff(thresholds: dict[int, float]) -> None:
    pipe = made("sd15", torch.float64)
    shares = {(step + 0.5) / STEPS: value for step, value in thresholds.items()}
    common = {"refinements": 7, "scale": 1000.0, "top": 0.4}
    edit = BoxDiff(WORDS, BOXES, thresholds=shares, paper=True, **common)
    got, taken = drawn(pipe, edit), []
    with literal.Model(pipe).written_out() as model:
        for i, prompt in enumerate(PROMPTS):
            want, rounds = literal.excited(
                model, prompt, tokens(pipe, i), literal.BoxLoss(BOXES[i], 0.4),
                thresholds=thresholds, seed=i, scale=1000.0, most=7,
            )  # fmt: skip
            taken += rounds
            assert relative(got[i], want[0]) < TOLERANCE
    assert not thresholds or {n < 7 for n in taken} == {True, False}
    assert relative(got, drawn(pipe, BoxDiff(WORDS, BOXES, thresholds=shares, **common))) > 1e-4


def sites(pipe: Any) -> list[str]:
    """The middle block and the up-block whose 16 x 16 cells hold the layout."""
    found = [s for s in control(pipe).sites if s.kind == "cross"]
    return [
        f"{s.path}.processor"
        for s in found
        if s.place == "mid" or (s.place == "up" and s.resolution == 1)
    ]


@pytest.mark.slow
def test_layout_guidance() -> None:
    pipe = with_scheduler(LMSDiscreteScheduler)
    pipe.unet.double(), pipe.text_encoder.double()
    cut = [
        [(0.1, 0.2, 0.7, 0.9), (0.45, 0.0, 1.0, 0.6)],
        [Region.box(0.05, 0.3, 0.4, 0.95) | Region.box(0.6, 0.1, 0.95, 0.4)],
    ]
    plain = [[[box] for box in cut[0]], [[(0.05, 0.3, 0.4, 0.95), (0.6, 0.1, 0.95, 0.4)]]]
    for threshold in (0.2, 0.45):
        edit = LayoutGuidance(WORDS, cut, stop=0.35, threshold=threshold, scale=3.0, paper=True)
        got, taken = drawn(pipe, edit), []
        with literal.Model(pipe).written_out() as model:
            for i, prompt in enumerate(PROMPTS):
                want, count = literal.laid_out(
                    model, prompt, indices(pipe, i), plain[i],
                    paths=sites(pipe), seed=i, threshold=threshold, scale=3.0,
                )  # fmt: skip
                taken.append(count)
                assert relative(got[i], want[0]) < TOLERANCE
        assert max(taken) == 10 and (threshold == 0.2 or min(taken) < 10)  # looked at, or not
    coverage = LayoutGuidance(WORDS, cut, stop=0.35, threshold=0.2, scale=3.0)
    assert relative(drawn(pipe, coverage), got) > 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_layout_guidance_of_a_few_steps_acts(steps: int) -> None:
    pipe = made("sd15")
    edit = LayoutGuidance(["cat"], [(0, 0, 0.5, 1)], iterations=1)
    with control(pipe, edit):
        SD15.run(pipe, PROMPTS[:1], steps=steps)
    assert [step for step, _ in edit.record] == [0]
