"""Caches: what they skip is not edited, and is said so unless the session is not strict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_first_block_cache

import hookctl
from hookctl import Editor
from hookctl.attention.call import AttentionCall
from hookctl.errors import HoleError, UnsupportedError
from hookctl.hooks.caches import cache_of
from hookctl.recipes import PAG
from tests import zoo

FLUX, SD15 = zoo.PIPELINES["flux"], zoo.PIPELINES["sd15"]


class Fades(Editor):
    """Changes every attention a little."""

    def attention(self, call: AttentionCall) -> None:
        call.replace(call.rows, v=1.1 * call.v)


def configs(pipe: Any) -> dict[str, Any]:
    return {
        "FirstBlockCache": FirstBlockCacheConfig(threshold=1e9),
        "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        ),
    }


@pytest.mark.parametrize("name", ["FirstBlockCache", "PyramidAttentionBroadcast"])
def test_a_cache_is_named_and_its_cure_works(name: str) -> None:
    pipe = FLUX.make()
    pipe.transformer.enable_cache(configs(pipe)[name])
    with (
        hookctl.control(pipe, Fades()),
        pytest.raises(HoleError, match=rf"{name} is on .* skips it in some .*disable_cache\(\)"),
    ):
        FLUX.run(pipe)
    with hookctl.control(pipe, Fades(), strict=False):
        cached = FLUX.run(pipe)
    pipe.transformer.disable_cache()
    with hookctl.control(pipe, Fades()):
        edited = FLUX.run(pipe)
    assert not torch.equal(cached, edited)
    with hookctl.control(FLUX.make(), Fades()) as session:
        assert torch.equal(FLUX.run(session.target), edited)


def test_a_cache_without_edits_is_left_alone() -> None:
    pipe = FLUX.make()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    plain = FLUX.run(pipe)
    with hookctl.control(pipe):
        assert torch.equal(FLUX.run(pipe), plain)


def test_hooks_that_were_applied_by_hand() -> None:
    pipe = FLUX.make()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=1e9))
    with (
        hookctl.control(pipe, Fades()),
        pytest.raises(HoleError, match="remove its hooks .*remove_hook"),
    ):
        FLUX.run(pipe)
    for module in pipe.transformer.modules():
        if hasattr(module, "_diffusers_hook"):
            for hook in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(hook)
    assert cache_of(pipe.transformer) is None


def test_rows_are_not_added_to_a_cached_model() -> None:
    pipe = FLUX.make()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with (
        hookctl.control(pipe, PAG(), strict=False),
        pytest.raises(UnsupportedError, match="other rows would spoil it: call disable_cache"),
    ):
        FLUX.run(pipe)


class Reusing:
    """A block that runs at every other step, as DeepCache has it."""

    def __init__(self, forward: Any) -> None:
        self.forward, self.kept, self.calls = forward, None, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls % 2:
            self.kept = self.forward(*args, **kwargs)
        return self.kept


def test_blocks_that_are_reused_are_noticed() -> None:
    pipe = SD15.make()
    block = pipe.unet.mid_block
    block.forward = Reusing(block.forward)
    with (
        hookctl.control(pipe, Fades()),
        pytest.raises(HoleError, match=r"1?\d edited sites that ran before .*step 1.*strict=False"),
    ):
        SD15.run(pipe)
    with hookctl.control(pipe, Fades(), strict=False):
        SD15.run(pipe)
    del block.forward
    with hookctl.control(pipe, Fades()):
        SD15.run(pipe)


def test_merged_tokens_are_named() -> None:
    pipe = SD15.make()
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    kind = type(block)
    block.__class__ = type("ToMeBlock", (kind,), {})  # as tomesd patches it
    with (
        hookctl.control(pipe, Fades()),
        pytest.raises(HoleError, match=r"token merging is on.*call tomesd.remove_patch\(pipe\)"),
    ):
        SD15.run(pipe)
    block.__class__ = kind
    with hookctl.control(pipe, Fades()):
        SD15.run(pipe)


def test_split_inference_is_refused_even_so() -> None:
    pipe = zoo.PIPELINES["animatediff"].make()
    pipe.enable_free_noise(context_length=4, context_stride=2)
    given = {"height": 64, "width": 64, "num_frames": 6, "num_inference_steps": 1}
    with hookctl.control(pipe, Fades()):
        pipe("a red cat", **given)
    pipe.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=2)
    for strict in (True, False):
        with (
            hookctl.control(pipe, Fades(), strict=strict),
            pytest.raises(HoleError, match=r"FreeNoise's split.*load the pipeline anew"),
        ):
            pipe("a red cat", **given)
