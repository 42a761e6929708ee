"""RealCompo: equal models, forced coefficients, the chain rule of its map, solvers with histories,
cost, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import hookctl
from hookctl.companions.prediction import ModelPrediction
from hookctl.errors import InputError
from hookctl.loop.noise import Noise, level_of
from hookctl.loop.state import Predictions, State
from hookctl.recipes.layout_guidance import LayoutGuidance
from hookctl.recipes.real_compo import RealCompo
from tests import zoo
from tests.recipes import runs
from tests.recipes.runs import relative

PROMPTS = ["a red cat above a blue square", "a blue dog"]
WORDS = [["cat", "square"], ["dog"]]
BOXES = [[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], [(0, 0, 0.5, 1)]]
CASE = zoo.PIPELINES["sd15"]
STEPS = 6
MULTISTEP = [DPMSolverMultistepScheduler, UniPCMultistepScheduler, PNDMScheduler]


def with_scheduler(scheduler: Any) -> Any:
    skip = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    return runs.with_scheduler(scheduler, **skip)


def other(pipe: Any) -> Any:
    """A second denoiser with weights of its own."""
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.05)
    return unet


def mixed(pipe: Any, layout: Any, **options: Any) -> Tensor:
    with hookctl.control(pipe, RealCompo(WORDS, BOXES, layout, alone=0.0, **options)):
        return CASE.run(pipe, PROMPTS, n=2)


def test_identities() -> None:
    pipe = CASE.make()
    plain = CASE.run(pipe, PROMPTS, n=2)
    twin, second = copy.deepcopy(pipe.unet), other(pipe)
    assert torch.allclose(mixed(pipe, twin), plain, atol=1e-4)  # equal models, any map
    assert torch.equal(mixed(pipe, second, coefficient=0.0), plain)
    other_pipe = CASE.make()
    other_pipe.unet = second
    expected = CASE.run(other_pipe, PROMPTS, n=2)
    assert torch.allclose(mixed(pipe, second, coefficient=1.0), expected, atol=1e-4)
    mixture = mixed(pipe, second, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(mixture, expected, atol=1e-3)
    assert torch.equal(CASE.run(pipe, PROMPTS, n=2), plain)


@pytest.mark.parametrize(
    ("scheduler", "paper"),
    [
        (DDIMScheduler, True),
        *((s, False) for s in (DDIMScheduler, EulerDiscreteScheduler, *MULTISTEP)),
    ],
)
@pytest.mark.slow  # whole runs of two models
def test_a_guidance_as_the_layout_model(scheduler: Any, paper: bool) -> None:
    """Alone it draws what the guidance draws, from the latents that it moved."""
    pipe = with_scheduler(scheduler)
    guidance = LayoutGuidance(WORDS, BOXES, stop=0.8, scale=3.0, iterations=1)
    with hookctl.control(pipe, guidance):
        expected = CASE.run(pipe, PROMPTS, steps=3)
    with hookctl.control(pipe, RealCompo(WORDS, BOXES, guidance, coefficient=1.0, paper=paper)):
        got = CASE.run(pipe, PROMPTS, steps=3)
    plain = CASE.run(pipe, PROMPTS, steps=3)
    assert relative(got, expected) < 1e-4 < relative(expected, plain)
    idle = LayoutGuidance(WORDS, BOXES, scale=0.0)
    with hookctl.control(pipe, RealCompo(WORDS, BOXES, idle, coefficient=1.0, paper=paper)):
        assert relative(CASE.run(pipe, PROMPTS, steps=3), plain) < 1e-5


class Recorded(RealCompo):
    """Keeps the coefficients that were mixed with."""

    def combine(self, predictions: Predictions) -> Tensor:
        mixture = super().combine(predictions)
        # A timestep that comes twice is one step, of two calls.
        times = [float(t) for t in predictions.state.pipe.scheduler.timesteps]
        last = {time: entry for entry, time in enumerate(times)}
        ends = [*list(last.values())[1:], len(times)]
        step = sum(predictions.state.clock.step >= end for end in ends)
        alone = step < int(self.alone * len(last))
        assert self.d is not None
        self.coefficients.append(torch.ones_like(self.d) if alone else self.d.sigmoid())
        return mixture

    def begin(self, state: State) -> None:
        super().begin(state)
        self.coefficients: list[Tensor] = []


def written_out(pipe: Any, second: Any, coefficients: list[Tensor], paper: bool) -> Tensor:
    """The loop in full: a scheduler for each model, or one for the mixture."""
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True, ["blurry"] * len(PROMPTS))
    text = torch.cat([uncond, cond])
    pipe.scheduler.set_timesteps(STEPS)
    shape = (1, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    x = torch.cat(noises) * pipe.scheduler.init_noise_sigma
    one, layout, plain = (copy.deepcopy(pipe.scheduler) for _ in range(3))

    def predict(unet: Any, t: Tensor) -> Tensor:
        u, c = unet(torch.cat([x, x]), t, text)[0].chunk(2)
        return u + CASE.guidance * (c - u)

    with torch.no_grad():
        for c, t in zip(coefficients, pipe.scheduler.timesteps, strict=True):
            e_l, e_t = predict(second, t), predict(pipe.unet, t)
            if paper:
                x = one.step(c * e_l + (1 - c) * e_t, t, x)[0]
            else:
                x = c * layout.step(e_l, t, x)[0] + (1 - c) * plain.step(e_t, t, x)[0]
    return x


@pytest.mark.parametrize("scheduler", MULTISTEP)
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.slow  # whole runs, solver by solver
def test_histories_of_multistep_solvers(scheduler: Any, paper: bool) -> None:
    """Each model's own, which the mixture's is not once the layout model has been alone."""
    pipe = with_scheduler(scheduler)
    second = other(pipe)
    edit = Recorded(
        WORDS, BOXES, second, alone=0.4, generator=torch.Generator().manual_seed(0), paper=paper
    )
    with hookctl.control(pipe, edit):
        got = CASE.run(pipe, PROMPTS, steps=STEPS)
    assert {float(c.amin()) for c in edit.coefficients[:2]} == {1.0}
    assert relative(got, written_out(pipe, second, edit.coefficients, paper)) < 1e-4
    assert relative(got, written_out(pipe, second, edit.coefficients, not paper)) > 1e-3


@pytest.mark.slow
def test_a_constant_coefficient_needs_one_history() -> None:
    pipe = with_scheduler(DPMSolverMultistepScheduler)
    second = other(pipe)
    with hookctl.control(pipe, RealCompo(WORDS, BOXES, second, coefficient=0.3)):
        got = CASE.run(pipe, PROMPTS, steps=STEPS)
    for paper in (False, True):
        constant = [torch.tensor(0.3)] * STEPS
        assert relative(got, written_out(pipe, second, constant, paper)) < 1e-4


@pytest.mark.slow
def test_fresh_noise_is_the_pipelines() -> None:
    """The steps beside draw noise of their own, and none of it is left."""
    pipe = CASE.make()
    guidance = LayoutGuidance(WORDS, BOXES, stop=0.8, scale=3.0, iterations=1)
    with hookctl.control(pipe, guidance):
        expected = CASE.run(pipe, PROMPTS, steps=3, eta=1.0)
    with hookctl.control(pipe, RealCompo(WORDS, BOXES, guidance, coefficient=1.0)):
        assert relative(CASE.run(pipe, PROMPTS, steps=3, eta=1.0), expected) < 1e-4


class Watched(RealCompo):
    """Keeps what one update was made of, and L after moving d a little."""

    def combine(self, predictions: Predictions) -> Tensor:
        if not hasattr(self, "seen"):
            state = predictions.state
            x = state.latents
            both = self._predicted["cond"], predictions["cond"]
            layout, text = (ModelPrediction(e, e, x) for e in both)
            start, losses = self.d, []
            self._update(state, layout, text)
            self.seen = start - self.d
            towards = torch.sign(self.seen)
            for sign in (1, -1):
                self.d = start + sign * 1e-5 * towards
                losses.append(self._loss(state, layout, text))
            self.d = start
            self.slope = (losses[0] - losses[1]) / 2e-5
            self.predicted = (self.seen * towards).sum()
        return super().combine(predictions)

    def _loss(self, state: State, layout: ModelPrediction, text: ModelPrediction) -> Tensor:
        noise = Noise(state.pipe.scheduler)
        mixed = text.cond + self.d.sigmoid() * (layout.cond - text.cond)
        x0, eps = noise.split(state.latents, mixed, level_of(state))
        after = noise.after(state.pipe.scheduler.timesteps[state.clock.step])
        return self.energies_of(state, self.energy, latents=after.mix(x0, eps)).values.sum()


def test_the_change_of_the_map_is_its_gradient() -> None:
    """Against finite differences in float64; `paper` gives it without normalisation."""
    pipe = CASE.make()
    pipe.unet.double(), pipe.text_encoder.double()
    second = other(pipe)
    one = Watched(WORDS, BOXES, LayoutGuidance(WORDS, BOXES, scale=0.0), alone=0.0)
    one.layout = Fixed(second)
    one.paper = True
    one.generator = torch.Generator().manual_seed(0)
    with hookctl.control(pipe, one):
        CASE.run(pipe, PROMPTS)
    ratio = float(one.predicted / (2 * 1e6) / one.slope)
    assert ratio == pytest.approx(1.0, abs=1e-4)


class Fixed:
    """A layout model without maps of its own."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    def attach(self, target: Any, reader: Any) -> None:
        pass

    def begin(self, state: State) -> None:
        pass

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        return self.denoiser(**state.kwargs)[0], state.latents

    def energies(self, state: State, measure: Any) -> None:
        return None


@pytest.mark.slow
def test_cost_and_the_callers_random_state() -> None:
    pipe = CASE.make()
    second = other(pipe)
    calls: dict[str, int] = {"text": 0, "layout": 0}
    for name, unet in (("text", pipe.unet), ("layout", second)):

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        unet.register_forward_pre_hook(count)
    before = torch.get_rng_state()
    mixed(pipe, second, paper=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == {"text": 2, "layout": 2 + 2}  # paper: the text model's maps don't count
    mixed(pipe, second)
    assert calls == {"text": 2 + 4, "layout": 4 + 4}


def test_bad_input() -> None:
    pipe = CASE.make()
    with pytest.raises(InputError, match="own denoiser"):
        hookctl.control(pipe, RealCompo(WORDS, BOXES, pipe.unet)).__enter__()
    with pytest.raises(InputError, match="layout is a str"):
        RealCompo(WORDS, BOXES, "gligen")
    with pytest.raises(InputError, match="coefficient"):
        RealCompo(WORDS, BOXES, pipe.unet, coefficient=2)


def test_the_first_map_of_an_image_is_its_own() -> None:
    """However many are drawn beside it."""

    def first(images: int) -> Tensor:
        edit = RealCompo(WORDS, BOXES, generator=torch.Generator().manual_seed(0))
        return edit._first_map(torch.zeros(images, 4, 16, 16))

    assert torch.equal(first(3)[:1], first(1))
    assert not torch.equal(first(3)[1], first(3)[0])
