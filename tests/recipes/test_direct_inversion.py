"""Direct inversion: the source gives the image back, and its edits get no offset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from hookctl.errors import UnsupportedError
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import DirectInversion, FreeU, PromptToPrompt
from tests.recipes.images import PROMPT, TARGET, counted, image, pipeline

STEPS = 5


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_source_is_the_image(scheduler: Any) -> None:
    pipe = pipeline("sd15", scheduler)
    found = DirectInversion(pipe, image(), PROMPT, steps=STEPS, guidance=4.0).run()
    again = found.reconstruct(pipe, "latent")
    assert (again - found.path[-1]).abs().max() < 1e-4
    edit = PromptToPrompt([PROMPT, TARGET], blend="cat")
    source, edited = found.edit(pipe, edit, guidance=4.0, output_type="latent")
    assert (source - found.path[-1][0]).abs().max() < 1e-4
    assert (edited - source).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_on_other_families(name: str) -> None:
    pipe = pipeline(name)
    found = DirectInversion(pipe, image(), PROMPT, steps=3, guidance=4.0).run()
    assert (found.reconstruct(pipe, "latent") - found.path[-1]).abs().max() < 1e-4


@pytest.mark.slow
def test_the_source_gets_what_its_guided_step_misses_and_its_edits_nothing() -> None:
    """Each step as published: o = x*' - step(x*), added to the source before LocalBlend's step."""
    pipe = pipeline()
    found = DirectInversion(pipe, image(), PROMPT, steps=STEPS, guidance=4.0).run()
    literal = Trajectory(pipe, [PROMPT, TARGET], steps=STEPS, guidance=4.0)
    literal.write(found.latents, level=0)
    for i in range(STEPS):
        alone = Trajectory(pipe, PROMPT, steps=STEPS, guidance=4.0)
        alone.write(found.path[i], level=i)
        offset = torch.zeros_like(literal.latents)
        offset[:1] = found.path[i + 1] - alone.denoise(i)
        literal.denoise(i, adjust=lambda x, o=offset: x + o)
    edited = found.edit(pipe, prompts=[PROMPT, TARGET], guidance=4.0, output_type="latent")
    torch.testing.assert_close(edited, literal.latents, atol=5e-3, rtol=1e-3)


def test_unit_noise_leads_the_source_all_the_same() -> None:
    pipe, images = pipeline(), [image(0), image(1)]
    given: dict[str, Any] = {"steps": STEPS, "guidance": 4.0}
    plain = DirectInversion(pipe, image(), PROMPT, **given).run()
    found = DirectInversion(pipe, images, [PROMPT, PROMPT], unit_noise=True, **given).run()
    levels = Trajectory(pipe, PROMPT, steps=STEPS).levels
    for one in found:
        assert torch.equal(one.reconstruct(pipe, "latent"), one.path[-1])
        for level, x in zip(levels[:-1], one.path, strict=False):
            eps = (x - level.signal * one.path[-1]) / level.noise
            assert abs(float(eps.mean())) < 1e-3
            assert float(eps.std(correction=0)) == pytest.approx(1, abs=1e-3)
    assert torch.equal(found[0].path[-1], plain.path[-1])
    assert not torch.allclose(found[0].path[0], plain.path[0], atol=1e-2)


def test_editors_of_the_model_may_come_later() -> None:
    pipe = pipeline()
    found = DirectInversion(pipe, image(), PROMPT, steps=STEPS, guidance=4.0).run()
    source, edited = found.edit(pipe, FreeU(), prompts=[PROMPT, TARGET], output_type="latent")
    assert torch.equal(source, found.path[-1][0])
    plain = found.edit(pipe, prompts=[PROMPT, TARGET], output_type="latent")[1]
    assert not torch.equal(edited, plain)


def test_cost() -> None:
    pipe = pipeline()
    with counted(pipe) as rows:
        DirectInversion(pipe, image(), PROMPT, steps=STEPS).run()
    assert rows == [1] * STEPS


def test_a_random_sampler_is_refused() -> None:
    pipe = pipeline("sd15", EulerAncestralDiscreteScheduler)
    with pytest.raises(UnsupportedError, match="draw no noise"):
        DirectInversion(pipe, image(), PROMPT, steps=3).run()
