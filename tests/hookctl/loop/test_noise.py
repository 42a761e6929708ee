"""Levels and predictions of schedulers, against what their own add_noise and step do."""

from __future__ import annotations

import diffusers
import pytest
import torch

from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.noise import Level, Noise

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMES = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip


def scheduler(name: str, **more: object) -> object:
    config = {} if "Flow" in name else CONFIG | more
    config |= {"clip_sample": False} if name == "DDIMScheduler" else {}
    made = getattr(diffusers, name)(**config)
    made.set_timesteps(12)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_those_of_add_noise(name: str) -> None:
    made = scheduler(name)
    noise = Noise(made)
    x0, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    for t in made.timesteps[[0, 4, 10]]:
        add = made.scale_noise if noise.flow else made.add_noise
        args = (x0, t[None], eps) if noise.flow else (x0, eps, t[None])
        torch.testing.assert_close(noise.level(t).mix(x0, eps), add(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_split_and_join_are_inverse_and_agree_with_the_step(name: str, kind: str) -> None:
    made = scheduler(name, prediction_type=kind)
    noise = Noise(made)
    t = made.timesteps[3]
    level = noise.level(t)
    x, prediction = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    x0, eps = noise.split(x, prediction, level)
    torch.testing.assert_close(level.mix(x0, eps), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noise.join(x0, eps, level), prediction, rtol=1e-5, atol=1e-5)
    if name == "DDIMScheduler":
        out = made.step(prediction, t, x)
        torch.testing.assert_close(out.pred_original_sample, x0, rtol=1e-5, atol=1e-5)
        stepped = noise.after(t).mix(x0, eps)
        torch.testing.assert_close(out.prev_sample, stepped, rtol=1e-5, atol=1e-5)


def test_flow_split_agrees_with_the_step() -> None:
    made = scheduler("FlowMatchEulerDiscreteScheduler")
    noise = Noise(made)
    t = made.timesteps[3]
    x, prediction = torch.randn(2, 1, 4, 8, 8)
    x0, eps = noise.split(x, prediction, noise.level(t))
    stepped = made.step(prediction, t, x).prev_sample
    torch.testing.assert_close(noise.after(t).mix(x0, eps), stepped, rtol=1e-4, atol=1e-4)


def test_inverted_sigmas_begin_with_noise() -> None:
    """Mochi, OmniGen: sigma is the share of the image, and velocities lead to it."""
    made = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    made.set_timesteps(12)
    noise = Noise(made)
    assert noise.levels()[0] == Level(0.0, 1.0)
    assert noise.levels()[-1] == Level(1.0, 0.0)
    t = made.timesteps[3]
    x, prediction = torch.randn(2, 1, 4, 8, 8)
    x0, eps = noise.split(x, prediction, noise.level(t))
    torch.testing.assert_close(noise.join(x0, eps, noise.level(t)), prediction)
    stepped = made.step(prediction, t, x).prev_sample
    torch.testing.assert_close(noise.after(t).mix(x0, eps), stepped)


def test_the_second_call_of_a_step_has_a_level_of_its_own() -> None:
    """KDPM2 calls the denoiser halfway between two of its sigmas."""
    made = scheduler("KDPM2DiscreteScheduler")
    noise = Noise(made)
    x0, eps = torch.randn(2, 1, 4, 8, 8)
    x = noise.at(0).mix(x0, eps)
    for entry, t in enumerate(made.timesteps[:4]):
        torch.testing.assert_close(noise.at(entry).mix(x0, eps), x, rtol=1e-4, atol=1e-4)
        assert noise.level(t) == noise.at(entry)
        x = made.step(eps, t, x).prev_sample


def test_timesteps_that_come_several_times_have_levels_of_their_own() -> None:
    made = diffusers.DPMSolverMultistepScheduler(**CONFIG, use_karras_sigmas=True)
    made.set_timesteps(50)
    noise = Noise(made)
    times = made.timesteps.tolist()
    first = next(i for i, t in enumerate(times[1:]) if t == times[i])
    for entry in (first, first + 1):
        sigma = float(made.sigmas[entry])
        assert noise.at(entry).noise == pytest.approx(sigma / (1 + sigma**2) ** 0.5)
    assert noise.level(times[first]) == noise.at(first + 1)  # what its step starts from


class _Named(diffusers.FlowMatchEulerDiscreteScheduler):
    """Somebody's own."""


def test_schedulers_are_known_by_what_they_are_made_from() -> None:
    assert Noise(_Named()).kind == "flow_prediction"


def test_renoise_keeps_the_signal_and_the_variance() -> None:
    made = scheduler("DDIMScheduler")
    noise = Noise(made)
    low, high = noise.level(made.timesteps[8]), noise.level(made.timesteps[2])
    x = low.mix(torch.full((1, 1, 400, 400), 2.0), torch.randn(1, 1, 400, 400))
    up = noise.renoise(x, low, high, torch.Generator().manual_seed(0))
    assert abs(float(up.mean()) - 2.0 * high.signal) < 0.01
    assert abs(float(up.std()) - high.noise) < 0.01
    with pytest.raises(InputError, match="not noisier"):
        noise.renoise(x, high, low)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="EDMEulerScheduler"):
        Noise(diffusers.EDMEulerScheduler())
    with pytest.raises(InputError, match="no timesteps"):
        made = diffusers.DDIMScheduler(**CONFIG)
        made.timesteps = made.timesteps[:0]
        _ = Noise(made).timesteps
    noise = Noise(scheduler("DDIMScheduler"))
    with pytest.raises(UnsupportedError, match="without signal"):
        noise.split(torch.zeros(1), torch.zeros(1), Level(0.0, 1.0))
