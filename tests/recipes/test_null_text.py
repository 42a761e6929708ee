"""Null-text optimisation against the published loop, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes import DDIMInversion, NullTextInversion
from tests.families.fingerprint import differences, fingerprint
from tests.recipes.images import PROMPT, TARGET, counted, image, pipeline

STEPS, SCALE = 3, 4.0


def published(pipe: Any, path: list[Tensor], iterations: int, enough: float) -> list[Tensor]:
    """The notebook's null_optimization, with its numbers of 50 steps taken as fractions."""
    cond = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    null = pipe.encode_prompt("", "cpu", 1, False)[0]
    x, out = path[0], []
    for i, t in enumerate(pipe.scheduler.timesteps):
        null = null.clone().detach().requires_grad_(True)
        adam = torch.optim.Adam([null], lr=1e-2 * (1.0 - i / (2 * STEPS)))
        with torch.no_grad():
            eps_cond = pipe.unet(x, t, cond, return_dict=False)[0]
        for _ in range(iterations):
            eps = pipe.unet(x, t, null, return_dict=False)[0]
            eps = eps + SCALE * (eps_cond - eps)
            step = pipe.scheduler.step(eps, t, x, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(step, path[i + 1])
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < enough + 1e-3 * i / STEPS:
                break
        out.append(null.detach())
        with torch.no_grad():
            eps = pipe.unet(x, t, null, return_dict=False)[0]
            eps = eps + SCALE * (eps_cond - eps)
            x = pipe.scheduler.step(eps, t, x, return_dict=False)[0]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("enough", [1e-5, 0.3])
def test_the_embeddings_are_those_of_the_published_loop(enough: float) -> None:
    pipe = pipeline()
    given = {"steps": STEPS, "guidance": SCALE, "iterations": 3, "tolerance": enough}
    found = NullTextInversion(pipe, image(), PROMPT, **given).run()
    expected = published(pipe, list(found.path), 3, enough)
    for correction, wanted in zip(found.corrections, expected, strict=True):
        torch.testing.assert_close(correction.contexts["uncond"], wanted, atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_it_leads_nearer_to_the_image_than_guided_ddim() -> None:
    pipe = pipeline()
    given = {"steps": STEPS, "guidance": SCALE, "iterations": 15, "rate": 0.1}
    found = NullTextInversion(pipe, image(), PROMPT, **given).run()
    plain = DDIMInversion(pipe, image(), PROMPT, steps=STEPS).run()
    clean = found.path[-1]
    fitted = (found.reconstruct(pipe, "latent") - clean).square().mean()
    guided = plain.edit(pipe, source_guidance=SCALE, output_type="latent")
    assert fitted < 0.7 * (guided - clean).square().mean()


@pytest.mark.slow
def test_each_of_several_images_stops_for_itself() -> None:
    pipe = pipeline()
    given = {"steps": 2, "guidance": SCALE, "iterations": 3, "tolerance": 0.3}
    both = NullTextInversion(pipe, [image(0), image(1)], [PROMPT, TARGET], **given).run()
    for i, (seed, prompt) in enumerate([(0, PROMPT), (1, TARGET)]):
        alone = NullTextInversion(pipe, image(seed), prompt, **given).run()
        for a, b in zip(both[i].corrections, alone.corrections, strict=True):
            torch.testing.assert_close(
                a.contexts["uncond"], b.contexts["uncond"], atol=2e-3, rtol=1e-2
            )


def test_flags_are_put_back_and_the_cost_is_bounded() -> None:
    pipe = pipeline()
    pipe.unet.conv_in.requires_grad_(False)
    before = fingerprint(pipe)
    with counted(pipe) as rows:
        NullTextInversion(pipe, image(), PROMPT, steps=STEPS, iterations=2, tolerance=0.0).run()
    # The inversion; then the conditional row, the fitting and the step.
    assert rows == [1] * STEPS + [1, 1, 1, 2] * STEPS
    assert not differences(before, fingerprint(pipe))
    assert not pipe.unet.conv_in.weight.requires_grad
    assert pipe.unet.conv_out.weight.requires_grad
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_bad_input() -> None:
    pipe = pipeline()
    with pytest.raises(InputError, match="there is no unconditional text"):
        NullTextInversion(pipe, image(), PROMPT, guidance=1.0)
    with pytest.raises(InputError, match="iterations=0"):
        NullTextInversion(pipe, image(), PROMPT, iterations=0)
    from diffusers import DPMSolverMultistepScheduler

    multistep = pipeline("sd15", DPMSolverMultistepScheduler)
    with pytest.raises(UnsupportedError, match="first-order"):
        NullTextInversion(multistep, image(), PROMPT, steps=3).run()
