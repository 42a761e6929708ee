"""Steps are found whatever was put in the place of the scheduler's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from hookctl import Editor, control
from hookctl.errors import UnsupportedError
from hookctl.loop.trajectory import Trajectory
from tests import zoo


class Halves(Editor):
    """Halves what the scheduler is given, and counts the steps."""

    def __init__(self) -> None:
        self.steps = 0

    def combine(self, predictions: Any) -> Tensor:
        return 0.5 * predictions.guided

    def after(self, state: Any) -> None:
        self.steps += 1


def any_arguments(step: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a, **k: step(*a, **k)


def other_names(step: Callable[..., Any]) -> Callable[..., Any]:
    def named(v: Tensor, time: Any, x: Tensor, **rest: Any) -> Any:
        return step(v, time, x, **rest)

    return named


class OtherClass(FlowMatchEulerDiscreteScheduler):
    """A scheduler of somebody's own."""

    def step(self, v, time, x, return_dict=True):
        return super().step(v, time, x, return_dict=return_dict)


@pytest.mark.parametrize("replaced", [any_arguments, other_names, "class"])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_editors_act_whatever_the_step_is(name: str, replaced: Any) -> None:
    case = zoo.PIPELINES[name]
    pipe, editor = case.make(), Halves()
    with control(pipe, Halves()):
        expected = case.run(pipe)
    assert not torch.equal(expected, case.run(pipe))
    if replaced != "class":
        pipe.scheduler.step = replaced(pipe.scheduler.step)
    elif isinstance(pipe.scheduler, DDIMScheduler):
        return  # the class below is of the other
    else:
        pipe.scheduler = OtherClass.from_config(pipe.scheduler.config)
    with control(pipe, editor):
        got = case.run(pipe)
    assert torch.equal(got, expected)
    assert editor.steps == 2


def test_a_program_steps_by_it_too() -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    given: dict[str, Any] = {"steps": 3, "eta": 1.0}
    plain = Trajectory(pipe, "a cat", generator=torch.Generator().manual_seed(0), **given).run()
    pipe.scheduler.step = any_arguments(pipe.scheduler.step)
    run = Trajectory(pipe, "a cat", generator=torch.Generator().manual_seed(0), **given)
    assert torch.equal(run.run(), plain)


def test_a_step_that_is_never_seen_is_told() -> None:
    """Put in the place of our own hook, inside the context."""

    class Counts(Editor):
        def after(self, state: Any) -> None:
            """Would be lost."""

    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    own = pipe.scheduler.step
    with (
        control(pipe, Counts(), strict=False),
        pytest.raises(UnsupportedError, match=r"without a call of pipe\.scheduler\.step"),
    ):
        pipe.scheduler.step = own
        case.run(pipe)
