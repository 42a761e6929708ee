"""Pipelines of several stages, and calls whose rows can't be told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookctl import Editor, control
from hookctl.address.pipelines import layout_of, scheduler_of
from hookctl.address.rows import COND, IMAGE, UNCOND, resolve_rows
from hookctl.errors import UnsupportedError
from hookctl.loop.run import _check_rows
from tests.zoo.wild import WILD


class Clocks(Editor):
    """Keeps denoiser, step and steps of every call, and how many prompts it knows of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    def denoise(self, state: Any, proceed: Any) -> Any:
        kind = type(state.denoiser).__name__
        self.seen.append((kind, state.clock.step, state.clock.steps, len(state.prompts)))
        return proceed()


@pytest.mark.slow
def test_each_stage_of_a_combined_pipeline_counts_its_own_steps() -> None:
    case, clocks = WILD["KandinskyV22CombinedPipeline"], Clocks()
    pipe = case.make()
    with control(pipe, clocks):
        for _ in range(2):
            case.draw(pipe, ["a red cat"], ["blurry"], [0])
    half = len(clocks.seen) // 2
    assert clocks.seen[:half] == clocks.seen[half:], "a second run counts as the first"
    prior = [seen for seen in clocks.seen[:half] if seen[0] == "PriorTransformer"]
    decoder = [seen for seen in clocks.seen[:half] if seen[0] != "PriorTransformer"]
    for stage in (prior, decoder):
        assert [seen[1:3] for seen in stage] == [(i, len(stage)) for i in range(len(stage))]
    assert {seen[3] for seen in prior} == {2}, "a prior draws the negative prompt beside the other"


def test_stable_cascade_counts_its_steps() -> None:
    case, clocks = WILD["StableCascadeCombinedPipeline"], Clocks()
    pipe = case.make()
    with control(pipe, clocks):
        case.draw(pipe, ["a red cat"], ["blurry"], [0])
    assert [seen[1:3] for seen in clocks.seen] == [(0, 2), (1, 2)] * 2


def test_a_schedule_that_lists_its_end_and_is_gone_through_for_each_tile() -> None:
    case, clocks = WILD["LTX2DFRTemporalRefinePipeline"], Clocks()
    pipe = case.make()
    with control(pipe, clocks):
        case.draw(pipe, ["a red cat"], ["blurry"], [0])
    assert pipe.scheduler.timesteps.tolist()[-1] == 0
    assert [seen[1:3] for seen in clocks.seen] == [(0, 2), (1, 2)] * 2


def test_a_prior_has_its_own_scheduler() -> None:
    pipe = WILD["StableUnCLIPPipeline"].make()
    assert scheduler_of(pipe, pipe.prior) is pipe.prior_scheduler
    assert scheduler_of(pipe, pipe.unet) is pipe.scheduler


def test_omnigen_predicts_without_the_text_before_it_predicts_with_the_images_alone() -> None:
    rows = resolve_rows(3, layout_of(WILD["OmniGenPipeline"].make()), prompts=1)
    assert [row.branch for row in rows] == [COND, UNCOND, IMAGE]


@pytest.mark.parametrize(
    ("sample", "why"),
    [([[torch.zeros(4, 1, 8, 8)]], "several images in each row"), (torch.zeros(7), "one sequence")],
)
def test_calls_without_rows_of_one_image_are_refused(sample: Any, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        _check_rows(sample, object())
