"""DDIM inversion against the published formula, refined to exactness, and refused input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image

import hookctl
from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes import DDIMInversion, FreeU, PromptToPrompt
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.recipes.images import PROMPT, TARGET, counted, image, pipeline

STEPS = 5


def test_the_path_is_that_of_the_published_code() -> None:
    """null-text notebook: eps = unet(x, t) for x one level below t, alpha_bar_0 at the end."""
    pipe = pipeline()
    found = DDIMInversion(pipe, image(), PROMPT, steps=STEPS).run()
    pixels = pipe.image_processor.preprocess(image())
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    alphas = pipe.scheduler.alphas_cumprod.double()
    with torch.no_grad():
        x = pipe.vae.encode(pixels).latent_dist.mean.double() * pipe.vae.config.scaling_factor
        path = [x]
        for t in pipe.scheduler.timesteps.flip(0):
            before = int(t) - 1000 // STEPS
            a, a_next = alphas[before] if before >= 0 else alphas[0], alphas[int(t)]
            eps = pipe.unet(x.float(), t, text, return_dict=False)[0].double()
            x = a_next.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
            path.append(x)
    for given, expected in zip(found.path, reversed(path), strict=True):
        torch.testing.assert_close(given.double(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.long  # many rounds a step
def test_refined_it_is_exact_on_a_trained_model() -> None:
    """The fixed point needs a model that does not change wildly with its input."""
    pipe = hookctl.load_shapes()
    prompt = "a red circle above a blue square"
    shown = pipe(prompt, num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    errors = []
    for refine in (0, 5):
        found = DDIMInversion(pipe, shown.images[0], prompt, steps=25, refine=refine).run()
        errors.append(float((found.reconstruct(pipe, "latent") - found.path[-1]).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_it_leaves_nothing_behind_and_costs_a_call_a_step() -> None:
    pipe = pipeline()
    before = fingerprint(pipe)
    with counted(pipe) as rows:
        found = DDIMInversion(pipe, image(), PROMPT, steps=STEPS, refine=1).run()
    assert rows == [1] * 2 * STEPS
    with counted(pipe) as rows:
        found.edit(pipe, prompts=[PROMPT, TARGET], guidance=3.0)
    assert rows == [4] * STEPS
    assert not differences(before, fingerprint(pipe))


def test_several_images_at_once_are_each_its_own() -> None:
    pipe = pipeline()
    images, prompts = [image(0), image(1)], [PROMPT, TARGET]
    both = DDIMInversion(pipe, images, prompts, steps=3).run()
    for one, prompt, part in zip(images, prompts, both, strict=True):
        alone = DDIMInversion(pipe, one, prompt, steps=3).run()
        assert part.prompt == prompt
        torch.testing.assert_close(part.latents, alone.latents, atol=1e-4, rtol=1e-4)


def test_wide_images_and_progress() -> None:
    pipe, told = pipeline(), []
    wide = image(size=(128, 64))
    found = DDIMInversion(pipe, wide, PROMPT, steps=3).run(lambda i, n: told.append((i, n)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert found.latents.shape[-2:] == (8, 16)
    assert found.reconstruct(pipe)[0].size == (128, 64)


def test_editors_of_the_model_act_in_the_inversion_too() -> None:
    pipe = pipeline()
    with hookctl.control(pipe, FreeU()):
        found = DDIMInversion(pipe, image(), PROMPT, steps=3).run()
    plain = DDIMInversion(pipe, image(), PROMPT, steps=3).run()
    assert torch.equal(found.path[-1], plain.path[-1])
    assert not torch.equal(found.latents, plain.latents)


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (DDIMScheduler, {"clip_sample": True}),
    ],
)
def test_schedulers_that_cannot_be_inverted_are_refused(scheduler: Any, config: Any) -> None:
    pipe = pipeline("sd15", scheduler, **config)
    with pytest.raises(UnsupportedError, match="use DDIMScheduler, EulerDiscreteScheduler"):
        DDIMInversion(pipe, image(), PROMPT, steps=4).run()


def test_bad_images_and_prompts() -> None:
    pipe = pipeline()
    with pytest.raises(InputError, match="mode 'L'; give image.convert"):
        DDIMInversion(pipe, image().convert("L"), PROMPT)
    with pytest.raises(InputError, match="130 x 128 px"):
        DDIMInversion(pipe, Image.new("RGB", (130, 128)), PROMPT)
    with pytest.raises(InputError, match="give a PIL image in mode RGB"):
        DDIMInversion(pipe, "cat.png", PROMPT)
    with pytest.raises(InputError, match="1 images and 2 prompts"):
        DDIMInversion(pipe, [image()], [PROMPT, TARGET])
    with pytest.raises(InputError, match="one size"):
        DDIMInversion(pipe, [image(), image(size=(64, 64))], [PROMPT, TARGET])
    with pytest.raises(InputError, match="steps=0"):
        DDIMInversion(pipe, image(), PROMPT, steps=0)
    with pytest.raises(InputError, match="timestep='up'"):
        DDIMInversion(pipe, image(), PROMPT, steps=2, timestep="up").run()


def test_edits_must_begin_with_the_images_prompt_and_sample_alike() -> None:
    pipe = pipeline()
    found = DDIMInversion(pipe, image(), PROMPT, steps=3).run()
    with pytest.raises(InputError, match="do not begin with 'a red cat above a dog'"):
        found.edit(pipe, PromptToPrompt([TARGET, PROMPT]))
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        {**pipe.scheduler.config, "timestep_spacing": "trailing"}
    )
    with pytest.raises(InputError, match="use the scheduler that it was inverted with"):
        found.edit(pipe, prompts=[PROMPT, TARGET])


def test_further_arguments_reach_the_pipeline() -> None:
    pipe = pipeline()
    given = {"negative_prompt_embeds": torch.ones(1, 77, pipe.unet.config.cross_attention_dim)}
    options = {"steps": 3, "guidance": 3.0}
    plain = DDIMInversion(pipe, image(), PROMPT, **options).run()
    other = DDIMInversion(pipe, image(), PROMPT, **options, arguments=given).run()
    assert not torch.equal(plain.latents, other.latents)
    drawn = other.reconstruct(pipe, output_type="latent")
    assert not torch.equal(drawn, replace(other, arguments={}).reconstruct(pipe, "latent"))
    with pytest.raises(InputError, match=r"arguments=\['eta'\] are given to the pipeline by the"):
        DDIMInversion(pipe, image(), PROMPT, arguments={"eta": 1.0})
    with pytest.raises(InputError, match="arguments=3; give a mapping"):
        DDIMInversion(pipe, image(), PROMPT, arguments=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="arguments={1: 2}; give a mapping, name -> value"):
        DDIMInversion(pipe, image(), PROMPT, arguments={1: 2})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="DDIMInversion: clip_skips: .* takes none; leave it out"):
        DDIMInversion(pipe, image(), PROMPT, arguments={"clip_skips": 2})


def test_a_pipeline_with_control_is_refused_by_name() -> None:
    pipe = zoo.PIPELINES["controlnet"].make()
    with pytest.raises(UnsupportedError, match="StableDiffusionControlNetPipeline computes its"):
        DDIMInversion(pipe, image(size=(128, 128)), PROMPT, steps=2).run()
