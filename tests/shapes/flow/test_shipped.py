"""The shipped flow-matching weights: layout, and a few images."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import hookctl
from hookctl.demos.shapes.detect import detect, matches
from hookctl.demos.shapes.evaluate import generate
from hookctl.demos.shapes.load import FLOW_WEIGHTS
from hookctl.recipes import PromptToPrompt

PROMPTS = (
    "a red circle and a blue square on a white background",
    "a green star above a yellow triangle on a gray background",
    "a purple cross on a black background",
    "a large orange square on a white background",
)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return hookctl.load_shapes(flow=True, device="cpu")


def test_layout(pipe: StableDiffusion3Pipeline) -> None:
    assert isinstance(pipe, StableDiffusion3Pipeline) and pipe.text_encoder_3 is None
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipe.vae_scale_factor == 8 and pipe.transformer.config.sample_size == 16
    assert sum(p.stat().st_size for p in FLOW_WEIGHTS.rglob("*") if p.is_file()) <= 30e6
    assert all(p.dtype == torch.float32 for p in pipe.transformer.parameters())


def test_plain_from_pretrained() -> None:
    loaded = StableDiffusion3Pipeline.from_pretrained(
        FLOW_WEIGHTS, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.bfloat16
    )
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16


@pytest.mark.slow
def test_images_are_what_they_are_asked_to_be(pipe: StableDiffusion3Pipeline) -> None:
    images, _ = generate(pipe, list(PROMPTS) * 2, 25, 3.0)
    right = [
        matches(detect(image), prompt)
        for image, prompt in zip(images, list(PROMPTS) * 2, strict=True)
    ]
    assert sum(right) >= 6


@pytest.mark.slow
def test_prompt_to_prompt_acts_on_joint_attention(pipe: StableDiffusion3Pipeline) -> None:
    """The edit is there, and the rest of the image keeps its place."""
    prompts = [PROMPTS[0], PROMPTS[0].replace("red", "green")]
    edit = PromptToPrompt(prompts, cross_replace=0.8, self_replace=0.4, self_resolution=1.0)
    with hookctl.control(pipe, edit):
        images = pipe(
            prompts, num_inference_steps=25, guidance_scale=3.0, generator=edit.generators(0)
        ).images
    source, edited = map(detect, images)
    assert matches(source, prompts[0]) and matches(edited, prompts[1])
