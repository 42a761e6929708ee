"""Every recipe, in every way that a pipeline runs: it changes what is drawn, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import hookctl
from hookctl import recipes
from hookctl.errors import HoleError, HookctlError, HookctlWarning
from tests import zoo
from tests.families.subjects import error
from tests.recipes.test_pairs import NAMES, PROMPTS, RECIPES, image

STEPS = 4
SIZE = (128, 128)


@cache
def parts() -> dict[str, Any]:
    pipe = zoo.PIPELINES["sd15"].make()
    return {**pipe.components, "requires_safety_checker": False}


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0) for _ in PROMPTS]


def call(pipe: Any, **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        PROMPTS,
        num_inference_steps=STEPS,
        generator=seeds(),
        output_type="latent",
        **arguments,
    ).images
    assert isinstance(found, Tensor)
    return found


def images() -> list[Image.Image]:
    return [image().resize(SIZE)] * 2


def mask() -> Image.Image:
    out = Image.new("L", SIZE)
    out.paste(255, (32, 32, 96, 96))
    return out


def text(pipe: Any) -> Tensor:
    return call(pipe)


def img2img(pipe: Any) -> Tensor:
    return call(pipe, image=images(), strength=0.5)


def inpaint(pipe: Any) -> Tensor:
    return call(
        pipe, image=images(), mask_image=[mask()] * 2, strength=0.5, height=SIZE[0], width=SIZE[1]
    )


KINDS: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
    "text": (diffusers.StableDiffusionPipeline, text),
    "img2img": (diffusers.StableDiffusionImg2ImgPipeline, img2img),
    "inpaint": (diffusers.StableDiffusionInpaintPipeline, inpaint),
}


@cache
def pipeline(kind: str) -> Any:
    return KINDS[kind][0](**parts())


@cache
def plain(kind: str) -> Tensor:
    return KINDS[kind][1](pipeline(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_it_acts_or_says_why_not(name: str, kind: str) -> None:
    pipe, run = pipeline(kind), KINDS[kind][1]
    before = plain(kind)
    try:
        with hookctl.control(pipe, RECIPES[name](recipes)) as session:
            after = run(pipe)
    except HookctlError as said:
        assert name in str(said)
        return
    assert error(after, before) > 1e-6
    assert "never acted" not in session.report()


def test_a_window_between_two_steps_is_told() -> None:
    late = recipes.PAG(start=0.8, stop=0.9)
    with pytest.raises(HookctlError, match=r"PAG changed nothing.*0\.8 to 0\.9.*0-3 of 4"):
        with hookctl.control(pipeline("text"), late):
            text(pipeline("text"))
    with pytest.warns(hookctl.errors.HookctlWarning, match="PAG changed nothing"):
        with hookctl.control(pipeline("text"), late, strict=False):
            text(pipeline("text"))


def test_an_inversion_that_skips_counts_its_own_steps() -> None:
    """6 of 10 steps run: a fifth of them is one step, and not none."""
    pipe = pipeline("text")
    edit = recipes.PromptToPrompt(PROMPTS, cross_replace=0.3, self_replace=0.2)
    inverted = recipes.EditFriendlyDDPM(
        pipe, image().resize(SIZE), PROMPTS[0], steps=10, skip=0.4
    ).run()
    with hookctl.control(pipe, Steps()) as session:
        inverted.edit(pipe, edit, output_type="latent")
    assert session.clock is not None and (session.clock.steps, session.clock.step) == (6, 5)
    assert session.clock.entry == 9
    assert STEPS_SEEN == set(range(6))


STEPS_SEEN: set[int] = set()


class Steps(hookctl.Editor):
    sites = "self mid"

    def attention(self, call: hookctl.AttentionCall) -> None:
        STEPS_SEEN.add(call.clock.step)


@pytest.mark.parametrize("strict", [True, False])
def test_run_without_a_step(strict: bool) -> None:
    """SDXL's `denoising_end` may leave none, and its pipeline draws the noise without a word."""
    pipe = zoo.PIPELINES["sdxl"].make()
    told: Any = pytest.raises(HoleError, match="without a call of its denoiser.*strength=")
    if not strict:
        told = pytest.warns(HookctlWarning, match="without a call of its denoiser")
    stepless: dict[str, Any] = {"num_inference_steps": 2, "denoising_end": 1e-4}
    stepless |= {"height": 32, "width": 32, "output_type": "latent"}
    with told, hookctl.control(pipe, recipes.FreeU(), strict=strict):
        pipe("a red circle", **stepless)
    with hookctl.control(pipe, recipes.FreeU()):
        with pytest.raises(ValueError, match="height"):  # the user's own to catch
            pipe("a red circle", height=33)
    with hookctl.control(pipe, recipes.FreeU(b1=1, b2=1, s1=1, s2=1)):
        pipe("a red circle", **stepless)
