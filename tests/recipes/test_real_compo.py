"""RealCompo: equal models, forced coefficients, the chain rule of its map, cost, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl.errors import InputError
from hookctl.loop.noise import Noise
from hookctl.loop.state import Predictions, State
from hookctl.recipes.energy_guidance import level_of
from hookctl.recipes.layout_guidance import LayoutGuidance
from hookctl.recipes.real_compo import RealCompo
from tests import zoo

PROMPTS = ["a red cat above a blue square", "a blue dog"]
WORDS = [["cat", "square"], ["dog"]]
BOXES = [[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], [(0, 0, 0.5, 1)]]
CASE = zoo.PIPELINES["sd15"]


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


def test_a_guidance_as_the_layout_model() -> None:
    """Alone it draws what the guidance draws: DDIM's step is that of the same clean picture."""
    pipe = CASE.make()
    idle = LayoutGuidance(WORDS, BOXES, scale=0.0)
    plain = CASE.run(pipe, PROMPTS, n=2)
    assert torch.allclose(mixed(pipe, idle, coefficient=1.0), plain, atol=1e-5)
    assert torch.isfinite(mixed(pipe, LayoutGuidance(WORDS, BOXES))).all()


class Watched(RealCompo):
    """Keeps what one update was made of, and L after moving d a little."""

    def combine(self, predictions: Predictions) -> Tensor:
        if not hasattr(self, "seen"):
            state = predictions.state
            layout, text = self._found["cond"], predictions["cond"]
            self.seen = self._change(state, layout, text)
            towards = torch.sign(self.seen)
            start, losses = self.d, []
            for sign in (1, -1):
                self.d = start + sign * 1e-5 * towards
                losses.append(self._loss(state, layout, text))
            self.d = start
            self.slope = (losses[0] - losses[1]) / 2e-5
            self.predicted = (self.seen * towards).sum()
        return super().combine(predictions)

    def _loss(self, state: State, layout: Tensor, text: Tensor) -> Tensor:
        noise = Noise(state.pipe.scheduler)
        c = self.d.sigmoid()
        x0, eps = noise.split(state.latents, text + c * (layout - text), level_of(state))
        after = noise.after(state.pipe.scheduler.timesteps[state.clock.turn])
        return self.measured(state, self.energy, latents=after.mix(x0, eps)).values.sum()


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

    def predict(self, state: State) -> Tensor:
        return self.denoiser(**state.kwargs)[0]

    def measured(self, state: State, measure: Any) -> None:
        return None


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
