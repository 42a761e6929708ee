"""Beside what else changes a run: caches, parallel and quantised models.

Modular pipelines and their guiders have tests/hookctl/loop/test_modular.py, schedulers whose `step`
is another callable tests/hookctl/hooks/test_scheduler.py.
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
)
from torch import Tensor, nn

import hookctl
from hookctl import Editor
from hookctl.attention.call import AttentionCall
from hookctl.errors import HoleError, UnsupportedError
from hookctl.recipes import PromptToPrompt, RegionalPrompts
from tests import zoo
from tests.families.subjects import error

SDXL, FLUX, SD15 = (zoo.PIPELINES[name] for name in ("sdxl", "flux", "sd15"))
PROMPTS = ["a red cat", "a blue cat"]
SIZE: dict[str, Any] = {"num_inference_steps": 3, "height": 128, "width": 128}
CLOSE = 1e-4  # one branch after the other, and both in one batch


class Fades(Editor):
    """Changes every attention a little."""

    def attention(self, call: AttentionCall) -> None:
        call.replace(call.rows, v=1.1 * call.v)


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
