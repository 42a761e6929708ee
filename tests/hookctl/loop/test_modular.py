"""Modular pipelines, which are put together from blocks, and their guiders."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLAutoBlocks
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.errors import HookctlError, InputError
from hookctl.recipes import FreeU, PromptToPrompt, RegionalPrompts
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.zoo.wild import WILD

SDXL = zoo.PIPELINES["sdxl"]
PROMPTS = ["a red cat", "a blue cat"]
SIZE: dict[str, Any] = {"num_inference_steps": 3, "height": 128, "width": 128}
CLOSE = 1e-4  # one branch after the other, and both in one batch


def modular(pipe: Any, guider: Any = None, blocks: Any = StableDiffusionXLAutoBlocks) -> Any:
    """The same model, put together from blocks."""
    made = blocks().init_pipeline()
    parts = {k: v for k, v in pipe.components.items() if v is not None}
    made.update_components(**{k: v for k, v in parts.items() if k in made._component_specs})
    if guider is not None:
        made.update_components(guider=guider)
    made.set_progress_bar_config(disable=True)
    return made


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0) for _ in PROMPTS]


def drawn(pipe: Any, prompts: list[str] | None = None) -> Tensor:
    given = {"prompt": prompts or PROMPTS, "negative_prompt": ["", ""], "generator": generators()}
    latents: Tensor = pipe(**given, output="latents", **SIZE)
    return latents


def of_class(pipe: Any, *editors: Editor, scale: float = 7.5) -> Tensor:
    """By the ordinary pipeline."""
    with hookctl.control(pipe, *editors):
        latents: Tensor = pipe(
            PROMPTS,
            negative_prompt=["", ""],
            guidance_scale=scale,
            generator=generators(),
            output_type="latent",
            return_dict=False,
            **SIZE,
        )[0]
    return latents


@pytest.mark.slow
def test_prompt_to_prompt_in_a_modular_pipeline() -> None:
    pipe = SDXL.make()
    blocks = modular(pipe)
    edit = PromptToPrompt(PROMPTS, self_replace=0.5, self_resolution=1.0)
    plain = drawn(blocks)
    before = fingerprint(blocks)
    want = of_class(pipe, edit, FreeU())
    with hookctl.control(blocks, edit, FreeU(), texts=PROMPTS) as session:
        found = drawn(blocks)
    assert error(found, want) < CLOSE
    assert error(found, plain) > 100 * CLOSE
    assert "PromptToPrompt" in session.report()
    assert torch.equal(drawn(blocks), plain)
    assert not differences(before, fingerprint(blocks))


# Blocks of a family, the scale of its guidance, and what makes it guide.
FAMILIES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "flux": ("FluxAutoBlocks", 3.5, {}),
    "sd3": ("StableDiffusion3AutoBlocks", 7.0, {"negative_prompt": ["", ""]}),
    "z_image": ("ZImageAutoBlocks", 0.0, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_modular_pipelines_of_transformers(name: str) -> None:
    """The same edit as by the ordinary pipeline of the family."""
    case, (blocks, scale, more) = zoo.PIPELINES[name], FAMILIES[name]
    pipe = case.make()
    made = modular(pipe, blocks=getattr(diffusers, blocks))
    edit = PromptToPrompt(PROMPTS, self_replace=0.5)
    size = {"num_inference_steps": 3, "height": 64, "width": 64}

    def run(one: Any, **given: Any) -> Any:
        return one(prompt=[*PROMPTS], generator=generators(), **size, **given)

    plain = run(made, output="latents", **more)
    with hookctl.control(made, edit, texts=PROMPTS):
        found = run(made, output="latents", **more)
    given = {"guidance_scale": scale, "output_type": "latent", "return_dict": False}
    with hookctl.control(pipe, edit):
        want = run(pipe, **given)[0]
    if want.dim() == 3:
        want = pipe._unpack_latents(want, 64, 64, pipe.vae_scale_factor)
    assert error(found, want) < CLOSE
    assert error(found, plain) > 100 * CLOSE
    assert torch.equal(run(made, output="latents", **more), plain)


def two_denoisers() -> Any:
    """Wan 2.2's, of which the second takes over below a noise level."""
    pipe = zoo.PIPELINES["wan"].make()
    other = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    pipe.register_modules(transformer_2=other)
    pipe.register_to_config(boundary_ratio=0.9)
    return pipe


# The pipeline, its blocks, what they draw, and what both are called with.
_VIDEO: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9}
_KLEIN = {"height": 64, "width": 64, "text_encoder_out_layers": (1, 2, 3)}
_QWEN = {"height": 64, "width": 64, "negative_prompt": ["", ""], "max_sequence_length": 512}
DRAWN: dict[str, tuple[Callable[[], Any], str, str, dict[str, Any]]] = {
    "klein": (zoo.PIPELINES["flux2_klein"].make, "Flux2KleinBaseAutoBlocks", "images", _KLEIN),
    "qwen": (zoo.PIPELINES["qwen_image"].make, "QwenImageAutoBlocks", "images", _QWEN),
    "wan": (zoo.PIPELINES["wan"].make, "WanBlocks", "videos", _VIDEO),
    "wan 2.2": (two_denoisers, "Wan22Blocks", "videos", _VIDEO),
    "ltx": (WILD["LTXPipeline"].make, "LTXAutoBlocks", "videos", _VIDEO),
}


def blocks_with(pipe: Any, name: str) -> list[Any]:
    """The blocks of a pipeline that have an attribute."""
    found = [pipe._blocks]  # `blocks` is a copy
    for block in found:
        found += getattr(block, "sub_blocks", {}).values()
    return [block for block in found if hasattr(block, name)]


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_what_modular_pipelines_draw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same edit of the same pictures as by the ordinary pipeline of the family."""
    # The blocks of Wan ask for a package that the pipeline does without.
    clean = SimpleNamespace(fix_text=lambda text: text)
    encoders = importlib.import_module("diffusers.modular_pipelines.wan.encoders")
    monkeypatch.setattr(encoders, "ftfy", clean, raising=False)
    make, blocks, output, given = DRAWN[name]
    pipe = make()
    made = modular(pipe, blocks=getattr(diffusers, blocks))
    for block in blocks_with(made, "prompt_template_encode_start_idx"):  # of another tokenizer
        block.prompt_template_encode_start_idx = pipe.prompt_template_encode_start_idx
    given = {"num_inference_steps": 3, "max_sequence_length": 64, "output_type": "pt"} | given
    known = inspect.signature(type(pipe).__call__).parameters
    scales = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    scale = {scales: made.guider.guidance_scale}
    if hasattr(made, "guider_2"):
        scale["guidance_scale_2"] = made.guider_2.guidance_scale

    def run(one: Any, **more: Any) -> Tensor:
        found = one(prompt=[*PROMPTS], generator=generators(), **given, **more)
        return torch.as_tensor(found if one is made else found[0])

    plain = run(made, output=output)
    edit = PromptToPrompt(PROMPTS, self_replace=0.5)
    with hookctl.control(made, edit, texts=PROMPTS) as session:
        found = run(made, output=output)
    with hookctl.control(pipe, edit) as same:
        want = run(pipe, return_dict=False, **scale)
    assert error(found, want) < CLOSE
    assert error(found, plain) > 10 * CLOSE
    assert session.report() == same.report()
    assert torch.equal(run(made, output=output), plain)


def test_a_modular_pipeline_says_what_it_is_to_be_told() -> None:
    blocks = modular(SDXL.make())
    with pytest.raises(InputError, match=r"control\(pipe, edit, texts=edit.prompts\)"):
        with hookctl.control(blocks, PromptToPrompt(PROMPTS)):
            drawn(blocks)
    with pytest.raises(HookctlError, match="StableDiffusionXLModularPipeline has no encode_prompt"):
        with hookctl.control(blocks, RegionalPrompts(["a dog"], [(0, 0, 0.5, 1)]), texts=PROMPTS):
            drawn(blocks)


@pytest.mark.slow
def test_a_guider_of_two_predictions() -> None:
    """Its rule is its own; what is edited is what it is given."""
    blocks = modular(SDXL.make(), AdaptiveProjectedGuidance(guidance_scale=5.0))
    edit = PromptToPrompt(PROMPTS, self_replace=0.5, self_resolution=1.0)
    plain = drawn(blocks)
    with hookctl.control(blocks, edit, texts=PROMPTS):
        edited = drawn(blocks)
    assert error(edited[:1], plain[:1]) < CLOSE  # the source is as it was
    assert error(edited[1:], plain[1:]) > 100 * CLOSE
    assert torch.equal(drawn(blocks), plain)


GUIDERS: dict[str, Any] = {
    "perturbed attention": lambda: PerturbedAttentionGuidance(
        5.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=skipping(
            skip_attention=False, skip_ff=False, skip_attention_scores=True
        ),
    ),
    "skip layer": lambda: SkipLayerGuidance(
        5.0, skip_layer_guidance_stop=1.0, skip_layer_config=skipping()
    ),
    # That of diffusers asks for a third prediction, and smooths none.
    "smoothed energy": lambda: SmoothedEnergyGuidance(
        5.0,
        seg_guidance_stop=1.0,
        seg_guidance_config=SmoothedEnergyGuidanceConfig(indices=[0], fqn=BLOCKS),
    ),
}
BLOCKS = "mid_block.attentions.0.transformer_blocks"


def skipping(**what: bool) -> LayerSkipConfig:
    return LayerSkipConfig(indices=[0], fqn=BLOCKS, **what)


class Asked(Editor):
    """Notes of every call whose rows it has."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, str]] = []

    def denoise(self, state: Any, proceed: Any) -> Any:
        row = state.rows[-1]
        self.seen.append((state.clock.step, row.branch, row.role))
        return proceed()


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_of_three_predictions(name: str) -> None:
    """The third is told from the others, and has the edits of the one that it perturbs."""
    blocks, asked = modular(SDXL.make(), GUIDERS[name]()), Asked()
    edit = PromptToPrompt(PROMPTS, self_replace=0.5, self_resolution=1.0)
    plain = drawn(blocks)
    with hookctl.control(blocks, edit, asked, texts=PROMPTS):
        edited = drawn(blocks)
    last = [seen[1:] for seen in asked.seen if seen[0] == asked.seen[-1][0]]
    assert last == [("cond", "cond"), ("uncond", "uncond"), ("perturbed", "cond")]
    assert error(edited[:1], plain[:1]) < 10 * CLOSE  # the source is as it was
    assert error(edited[1:], plain[1:]) > 100 * CLOSE
