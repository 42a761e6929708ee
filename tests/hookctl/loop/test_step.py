"""The end of a step: predictions put together otherwise, and latents changed after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import control
from tests import zoo
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO, assign_same, draw, editor
from tests.zoo.wild import WILD


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "pixart", "wan", "flux", "animatediff"])
def test_guidance_made_again_from_the_branches(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe, worst = case.make(), []
    guidance = max(case.guidance, 3.0)

    def combine(predictions: Any) -> Tensor:
        uncond, cond = predictions["uncond"], predictions["cond"]
        mine = uncond + guidance * (cond - uncond)
        worst.append(error(mine, predictions.guided))
        return mine

    edited = draw(case, pipe, editor(combine=combine), guidance=guidance)
    assert len(worst) == 2 and max(worst) < 1e-6
    assert error(edited, case.run(pipe, TWO, guidance=guidance)) < 1e-5


def test_what_combine_returns_is_stepped() -> None:
    pipe = SD15.make()
    edited = draw(SD15, pipe, editor(combine=lambda predictions: predictions["cond"]))
    assert error(edited, SD15.run(pipe, TWO, guidance=1.0)) < 1e-5


def test_after_the_step() -> None:
    pipe = SD15.make()

    def zero(state: Any) -> None:
        if state.clock.step == 1:
            state.latents = torch.zeros_like(state.latents)

    assert not draw(SD15, pipe, editor(after=zero)).any()
    same = draw(SD15, pipe, editor(after=assign_same))
    assert torch.equal(same, SD15.run(pipe, TWO))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"])
def test_a_step_that_is_first_called_for_an_estimate(name: str) -> None:
    """What the pipeline goes on with is seen and changed, once a step."""
    case = WILD[name]
    pipe, given, made = case.make(), [], []
    step = pipe.scheduler.step

    def noted(prediction: Tensor, t: Any, sample: Tensor, **options: Any) -> Any:
        given.append(sample)
        return step(prediction, t, sample, **options)

    def negate(state: Any) -> None:
        state.latents = -state.latents
        made.append(state.latents)

    pipe.scheduler.step = noted
    with control(pipe, editor(after=negate)):
        case.draw(pipe, ["a red cat"], ["blurry"], [0])
    assert len(made) == len(pipe.scheduler.timesteps) == len(given) / 2 > 1
    for before, sample in zip(made, given[3::2], strict=False):
        assert torch.equal(before, sample)
