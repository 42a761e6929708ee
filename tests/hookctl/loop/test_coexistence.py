"""Beside what else changes a run: modular pipelines, guiders, caches, parallel, quantised models.

Schedulers whose `step` is another callable have tests/hookctl/hooks/test_scheduler.py.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionXLAutoBlocks,
)
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from torch import Tensor, nn

import hookctl
from hookctl import Editor
from hookctl.attention.call import AttentionCall
from hookctl.errors import HoleError, HookctlError, InputError, UnsupportedError
from hookctl.recipes import FreeU, PromptToPrompt, RegionalPrompts
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error

SDXL, FLUX, SD15 = (zoo.PIPELINES[name] for name in ("sdxl", "flux", "sd15"))
PROMPTS = ["a red cat", "a blue cat"]
SIZE: dict[str, Any] = {"num_inference_steps": 3, "height": 128, "width": 128}
CLOSE = 1e-4  # one branch after the other, and both in one batch


class Fades(Editor):
    """Changes every attention a little."""

    def attention(self, call: AttentionCall) -> None:
        call.replace(call.rows, v=1.1 * call.v)


# -- modular pipelines and their guiders -----------------------------------------------------------


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


# -- caches ----------------------------------------------------------------------------------------


def caches() -> dict[str, Any]:
    def now() -> int:
        return 500

    found = {
        "FirstBlockCache": FirstBlockCacheConfig(threshold=1e9),
        "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=now,
        ),
        "FasterCache": FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            unconditional_batch_skip_range=1000,
            current_timestep_callback=now,
            is_guidance_distilled=True,
        ),
        "MagCache": MagCacheConfig(
            num_inference_steps=4, retention_ratio=0.2, mag_ratios=torch.ones(4).tolist()
        ),
    }
    if hasattr(diffusers, "TaylorSeerCacheConfig"):
        found["TaylorSeerCache"] = diffusers.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=1, max_order=1
        )
    return found


@pytest.mark.parametrize("name", list(caches()))
def test_a_cache_is_named_and_its_cure_works(name: str) -> None:
    pipe = FLUX.make()
    with hookctl.control(pipe, Fades()):
        want = FLUX.run(pipe, steps=4, guidance=1.0)
    pipe.transformer.enable_cache(caches()[name])
    with hookctl.control(pipe, Fades()), pytest.raises(HoleError, match=rf"{name} is on .*disable"):
        FLUX.run(pipe, steps=4, guidance=1.0)
    pipe.transformer.disable_cache()
    with hookctl.control(pipe, Fades()):
        assert torch.equal(FLUX.run(pipe, steps=4, guidance=1.0), want)


# -- parallel and quantised models -----------------------------------------------------------------


def test_a_model_over_several_devices_is_refused_by_name() -> None:
    pipe = FLUX.make()
    parallel = diffusers.ContextParallelConfig(ring_degree=2)
    pipe.transformer._parallel_config = parallel  # as enable_parallelism leaves it
    with pytest.raises(UnsupportedError, match="Fades edits attention.*context or tensor parallel"):
        hookctl.control(pipe, Fades()).__enter__()


class Int8Linear(nn.Module):
    """A linear layer of 8 bits, which is no `nn.Linear` and keeps no `weight` of floats."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", layer.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x) * self.scale.to(x), self.bias)


def quantised(model: nn.Module) -> int:
    """Exchange the linears of attention and of what follows it; how many there were."""
    found = [
        (parent, name, child)
        for path, parent in model.named_modules()
        if "attentions" in path or "blocks" in path
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, child in found:
        setattr(parent, name, Int8Linear(child))
    return len(found)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_quantised_weights(name: str) -> None:
    """Layers are called, never read: edits are those over the same weights as floats."""
    case = zoo.PIPELINES[name]
    low, floats = case.make(), case.make()
    model, other = case.denoiser_of(low), case.denoiser_of(floats)
    assert quantised(model) > 5
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, Int8Linear):
                layer = other.get_submodule(path)
                layer.weight.copy_(module.codes.to(layer.weight) * module.scale)
    edits = [
        PromptToPrompt(PROMPTS, self_replace=0.5, self_resolution=1.0),
        RegionalPrompts(["a dog"], [(0.0, 0.0, 0.5, 1.0)]),
    ]
    plain = case.run(low, PROMPTS)
    for edit in edits:
        with hookctl.control(low, edit):
            found = case.run(low, PROMPTS)
        with hookctl.control(floats, edit):
            want = case.run(floats, PROMPTS)
        assert error(found, want) < 1e-5
        assert error(found, plain) > 1e-4
    assert torch.equal(case.run(low, PROMPTS), plain)
