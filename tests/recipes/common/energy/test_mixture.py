"""Solvers beside the pipeline's, and the steps of a mixture of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from hookctl.loop.solver import OwnSolver
from hookctl.recipes.common.energy.mixture import MixedSteps, Part

FIRST = [DDIMScheduler, EulerDiscreteScheduler]
WITH_HISTORY = [
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
]


def scheduler(cls: Any, steps: int = 5) -> Any:
    options = {PNDMScheduler: {"skip_prk_steps": True}, DDIMScheduler: {"clip_sample": False}}
    made = cls(beta_schedule="scaled_linear", **options.get(cls, {}))
    made.set_timesteps(steps)
    return made


def noise(seed: int, shape: tuple[int, ...] = (2, 4, 6, 6)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cls", FIRST + WITH_HISTORY)
def test_a_solver_of_its_own_steps_as_the_scheduler(cls: Any) -> None:
    theirs, own = scheduler(cls), OwnSolver(scheduler(cls))
    x = y = noise(0)
    for step, time in enumerate(theirs.timesteps):
        assert torch.equal(own.model_input(y, step), theirs.scale_model_input(x, time))
        x = theirs.step(noise(step), time, x)[0]
        y = own.step(noise(step), step, y)
        assert torch.equal(x, y)
    assert own.remembers == (cls in WITH_HISTORY)


def test_a_program_that_goes_back_finds_the_state_it_left() -> None:
    own = OwnSolver(scheduler(DPMSolverMultistepScheduler))
    x = [noise(0)]
    for step in range(3):
        x.append(own.step(noise(step), step, x[-1]))
    assert torch.equal(own.step(noise(1), 1, x[1]), x[2])


@pytest.mark.parametrize("cls", FIRST + WITH_HISTORY)
def test_the_mixture_is_of_the_models_steps(cls: Any) -> None:
    """Against one solver for each model; another's addition to the prediction stays."""
    pipeline, mixture = scheduler(cls), MixedSteps(scheduler(cls), ["a", "b"])
    solvers = {name: OwnSolver(scheduler(cls)) for name in "ab"}
    x = noise(0)
    for step, time in enumerate(pipeline.timesteps):
        c, e = torch.rand(2, 1, 6, 6).double(), {name: noise(step + ord(name)) for name in "ab"}
        seen = {"a": x + 0.1 * noise(step), "b": x}
        weight = {"a": c, "b": 1 - c}
        parts = {name: Part(weight[name], e[name], seen[name]) for name in "ab"}
        mixed = c * e["a"] + (1 - c) * e["b"]
        more = mixture.difference(step, mixed, x, parts, {})
        assert more is not None
        pipeline.scale_model_input(x, time)
        got = pipeline.step(mixed, time, x)[0] + more
        want = sum(weight[n] * solvers[n].step(e[n], step, seen[n]) for n in "ab")
        assert torch.allclose(got, want, atol=1e-5)  # sigmas are float32
        x = got


@pytest.mark.parametrize("cls", FIRST)
def test_nothing_is_missing_from_a_first_order_step(cls: Any) -> None:
    mixture, x = MixedSteps(scheduler(cls), ["a", "b"]), noise(0)
    parts = {"a": Part(0.3, noise(1), x), "b": Part(0.7, noise(2), x)}
    assert mixture.difference(0, 0.3 * noise(1) + 0.7 * noise(2), x, parts, {}) is None


def test_noise_of_the_steps_cancels() -> None:
    """Fresh noise is the pipeline's own affair."""
    x, e = noise(0), noise(1)
    found = []
    for eta in (0.0, 1.0):
        mixture = MixedSteps(scheduler(DDIMScheduler), ["a"])
        more = mixture.difference(0, e, x, {"a": Part(1.0, e, x + 1)}, {"eta": eta})
        assert more is not None
        found.append(more.std())
    assert max(found) < 1e-5  # a moved x moves the next one by a constant
