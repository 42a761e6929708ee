"""Steps, fractions and windows for schedulers whose steps are not steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image

import hookctl
from hookctl.address.clock import Clock, Timekeeper, Window
from hookctl.editor import Editor
from hookctl.errors import InputError
from tests import zoo
from tests.zoo.wild import WILD

SD15 = zoo.PIPELINES["sd15"]


class Watch(Editor):
    def __init__(self, start: float = 0.0, stop: float = 1.0) -> None:
        self.start, self.stop = start, stop
        self.clocks: list[Clock] = []

    def before(self, state: Any) -> None:
        self.clocks.append(state.clock)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (DDIMScheduler, 4),
        (EulerDiscreteScheduler, 4),
        (DPMSolverMultistepScheduler, 4),
        (HeunDiscreteScheduler, 7),
        (KDPM2DiscreteScheduler, 7),
        (PNDMScheduler, 13),
    ],
)
def test_steps_of_schedulers(kind: Any, steps: int) -> None:
    pipe = SD15.make()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, skip_prk_steps=False)
    every, half = Watch(), Watch(0.0, 0.5)
    with hookctl.control(pipe, every, half):
        SD15.run(pipe, steps=4)
    assert [clock.step for clock in every.clocks] == list(range(steps))
    assert {clock.steps for clock in every.clocks} == {steps}
    assert [clock.step for clock in half.clocks] == list(range(int(0.5 * steps)))
    assert [clock.fraction for clock in every.clocks] == [i / steps for i in range(steps)]
    schedule = pipe.scheduler.timesteps.tolist()
    assert [clock.timestep for clock in every.clocks] == pytest.approx(schedule)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "z_image", "qwen_image", "pixart"])
def test_timesteps_are_the_schedulers(name: str) -> None:
    """Also where the denoiser is told another number: sigma, or 1 - sigma."""
    case, watch = zoo.PIPELINES[name], Watch()
    pipe = case.make()
    with hookctl.control(pipe, watch):
        case.run(pipe, steps=3)
    schedule = pipe.scheduler.timesteps.tolist()
    assert list(dict.fromkeys(c.timestep for c in watch.clocks)) == pytest.approx(schedule)
    assert all(c.timestep == schedule[c.step] for c in watch.clocks)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_time_that_rises_is_not_taken_for_another_steps(shift: float) -> None:
    """Z-Image is told 1 - sigma, which may be the sigma of a later step: 0.25 of 0.75."""
    case, watch = zoo.PIPELINES["z_image"], Watch()
    pipe = case.make()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    with hookctl.control(pipe, watch):
        case.run(pipe, steps=10, guidance=1.0)
    assert [clock.step for clock in watch.clocks] == list(range(10))
    assert [c.timestep for c in watch.clocks] == pytest.approx(pipe.scheduler.timesteps.tolist())


@pytest.mark.parametrize("name", ["ZImageImg2ImgPipeline", "Lumina2Pipeline"])
def test_rising_times_of_other_pipelines(name: str) -> None:
    watch, told = Watch(), []
    pipe = WILD[name].make()
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda v, timestep, *args, **more: (
        told.append(float(timestep)) or step(v, timestep, *args, **more)
    )
    with hookctl.control(pipe, watch):
        WILD[name].draw(pipe, ["a red cat"], ["blurry"], [0])
    assert told and list(dict.fromkeys(c.timestep for c in watch.clocks)) == pytest.approx(told)


def test_a_run_that_starts_in_the_middle() -> None:
    source = SD15.make()
    pipe = StableDiffusionImg2ImgPipeline(**source.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    watch, image = Watch(), Image.new("RGB", (128, 128))
    with hookctl.control(pipe, watch):
        for _ in range(2):
            pipe(
                "a red cat", image=image, strength=0.5, num_inference_steps=8, output_type="latent"
            )
    assert [clock.step for clock in watch.clocks] == 2 * [0, 1, 2, 3]
    assert {(clock.steps, clock.skipped) for clock in watch.clocks} == {(4, 4)}
    assert [clock.entry for clock in watch.clocks] == 2 * [4, 5, 6, 7]


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "svd", "pixart"])
def test_steps_of_families(name: str) -> None:
    case, watch = zoo.PIPELINES[name], Watch()
    pipe = case.make()
    with hookctl.control(pipe, watch):
        case.run(pipe, steps=3)
    assert sorted({clock.step for clock in watch.clocks}) == [0, 1, 2]


def follow(times: list[float], calls: int = 1, **cast: Any) -> list[int]:
    keeper, steps = Timekeeper(), []
    schedule = torch.tensor(times)
    for time in times:
        for _ in range(calls):
            steps.append(keeper.read(torch.tensor(time, **cast), schedule).step)
        keeper.advance()
    return steps


def test_several_calls_in_a_step_and_repeated_timesteps() -> None:
    assert follow([9.0, 5.0, 1.0], calls=2) == [0, 0, 1, 1, 2, 2]
    assert follow([9.0, 5.0, 5.0, 1.0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [4, 50, 1000])
def test_rounded_timesteps(dtype: torch.dtype, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    assert follow(scheduler.timesteps.tolist(), dtype=dtype) == list(range(steps))


def test_rising_timesteps_are_one_run() -> None:
    scheduler = DDIMInverseScheduler()
    scheduler.set_timesteps(5)
    assert follow(scheduler.timesteps.tolist()) == [0, 1, 2, 3, 4]


def test_a_second_run_starts_again() -> None:
    keeper, schedule = Timekeeper(), torch.tensor([9.0, 5.0])
    steps = []
    for time in (9.0, 5.0, 9.0, 5.0):
        steps.append(keeper.read(time, schedule).step)
        keeper.advance()
    assert steps == [0, 1, 0, 1]


def test_a_list_that_is_over_begins_anew() -> None:
    """Stages and chunks of one call of a pipeline, each with a list of its own; between chunks
    those that are done may be read at time 0."""
    keeper, steps = Timekeeper(), []
    for times in ([9.0, 6.0], [5.0, 2.0]):
        schedule = torch.tensor(times)
        for time in times:
            steps.append(keeper.read(time, schedule).step)
            keeper.advance()
    keeper.read(0.0, schedule)
    steps.append(keeper.read(5.0, schedule).step)
    assert steps == [0, 1, 0, 1, 0]


def test_nested_calls_move_nothing() -> None:
    keeper, schedule = Timekeeper(), torch.tensor([9.0, 5.0, 1.0])
    outer = keeper.read(9.0, schedule)
    assert keeper.peek(9.0, schedule, outer) is outer
    assert keeper.peek(1.0, schedule, outer).step == 2
    assert keeper.peek(123.0, schedule, outer).step == 0
    keeper.advance()
    assert keeper.read(5.0, schedule).step == 1


def test_bare_denoiser() -> None:
    keeper = Timekeeper()
    clocks = [keeper.read(torch.tensor([500, 500])) for _ in range(3)]
    assert [clock.step for clock in clocks] == [0, 1, 2]
    assert all(clock.steps == 0 and clock.fraction == 0 for clock in clocks)
    assert Window(0.0, 0.5).holds(clocks[2]) and not Window(0.5, 1.0).holds(clocks[2])


def test_windows() -> None:
    steps = range(50)
    held = [t for t in steps if Window(0.2, 0.8).holds(Clock(t, 50, 0.0))]
    assert held == list(range(10, 40))
    assert sum(Window(0.0, 0.29).holds(Clock(t, 100, 0.0)) for t in range(100)) == 29
    assert not any(Window(0.0, 0.0).holds(Clock(t, 50, 0.0)) for t in steps)
    assert all(Window().holds(Clock(t, 50, 0.0)) for t in steps)
    assert Window(0.0, 0.5).overlaps(Window(0.4, 1.0))
    assert not Window(0.0, 0.5).overlaps(Window(0.5, 1.0))
    assert Window.of(0.8, "x") == Window(0.0, 0.8)
    for bad in (1.2, -0.1, (0.6, 0.4), "a", (1, 2, 3)):
        with pytest.raises(InputError, match="x="):
            Window.of(bad, "x")


def test_the_time_of_tokens_that_are_drawn() -> None:
    """Of a timestep for each token, those of given images are 0 throughout."""
    keeper, schedule = Timekeeper(), torch.tensor([999, 833])
    for step, now in enumerate((999, 833)):
        clock = keeper.read(torch.tensor([[0, now, now, 0]]), schedule)
        assert (clock.step, clock.timestep) == (step, now)
