"""The official file of a Collaborative Diffusion: full shapes, and forwards and runs by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hookctl.errors import InputError
from hookctl.learned.collaborative import from_checkpoint
from hookctl.learned.collaborative.files import mask_vectors, modalities_of, unet_of
from hookctl.learned.loading import load
from tests.hookctl.learned import ldm
from tests.hookctl.learned.literal_ldm import Literal
from tests.hookctl.learned.test_collaborative import OfficialLoop, draw, in_double
from tests.recipes.runs import SD15, relative

# As the published ones, without attention at the full resolution; for the zoo's SD15.
TINY = ldm.Layout(8, (1, 2), (0, 1), 1, 32)
TINY_D = replace(TINY, channels=4, outputs=1)
SIZES: dict[str, Any] = {"heads": 2, "groups": 4, "classes": 5}
SIDE = 4


@dataclass
class File:
    tensors: Mapping[str, Tensor]


def tiny(models: bool = True) -> dict[str, Tensor]:
    """A composed file of random values; models: with those of the text."""
    found: dict[str, ldm.Shape] = {}
    for name in ("seg_mask", "text"):
        networks = {"unet": TINY, "confidence_predictor": TINY_D}
        for part, layout in networks.items():
            if models or (name, part) != ("text", "unet"):
                prefix = f"model.{name}_{part}.diffusion_model"
                found |= {f"{prefix}.{key}": shape for key, shape in ldm.unet(layout).items()}
    linear = "cond_stage_model.seg_mask_cond_stage_model.linear"
    found |= {f"{linear}.weight": (32, SIDE * SIDE), f"{linear}.bias": (32,)}
    found["first_stage_model.encoder.conv_in.weight"] = (4, 3, 3, 3)
    found["betas"] = (1000,)
    generator = torch.Generator().manual_seed(0)
    return {key: _drawn(key, shape, generator) for key, shape in found.items()}


def _drawn(key: str, shape: ldm.Shape, generator: torch.Generator) -> Tensor:
    size = max(1, torch.Size(shape[1:]).numel())
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) / size**0.5
    return 1 + 0.1 * drawn if key.endswith("weight") and len(shape) == 1 else drawn


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


MASK = Image.new("L", (16, 16))
MASK.paste(1, (0, 0, 8, 8))
MASK.paste(4, (4, 8, 16, 16))


def test_official_shapes() -> None:
    """Key by key at full size, without memory: counts and configuration as published."""
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in ldm.collaborative().items()}
    modalities = modalities_of(tensors)
    assert list(modalities) == ["mask", "text"]
    for one in modalities.values():
        for weights, channels, millions in (
            (one.unet, (192, 384, 576, 960), 403.6),
            (one.predictor, (32, 64, 96, 160), 13.14),
        ):
            unet = unet_of(weights)
            assert len(weights) == len(unet.state_dict()) == 688
            count = sum(p.numel() for p in unet.parameters()) / 1e6
            assert count == pytest.approx(millions, abs=0.05)
            assert tuple(unet.config.block_out_channels) == channels
            assert unet.config.attention_head_dim == 32
            assert unet.config.cross_attention_dim == 640
            assert unet.config.in_channels == 3
            assert unet.config.down_block_types[0] == "DownBlock2D"
            assert all(p.device.type == "meta" for p in unet.parameters())
    assert tuple(modalities["mask"].condition["linear.weight"].shape) == (640, 1024)


@pytest.mark.parametrize(
    ("layout", "heads", "groups"),
    [
        (TINY, 2, 4),
        (TINY_D, 4, 2),
        (ldm.Layout(8, (1, 2, 3), (1, 0, 2), 2, 12, linear=False, layers=1), 4, 8),
    ],
)
def test_a_network_is_the_literal_forward(layout: ldm.Layout, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {k: _drawn(k, s, generator) for k, s in ldm.unet(layout).items()}
    unet = unet_of(tensors, heads=heads, groups=groups)
    x = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    context = torch.randn(2, 5, layout.context, generator=generator, dtype=torch.float64)
    want = Literal(tensors, heads, groups)(x, 321, context)
    assert relative(unet(x, torch.tensor(321), context).sample, want) < 1e-10
    assert relative(unet.float()(x.float(), torch.tensor(321), context.float()).sample, want) < 1e-5


@pytest.mark.slow
def test_a_file_draws_as_the_official_sampler() -> None:
    """Both models, both dynamic diffusers and the mask's condition from the file, in float64."""
    pipe, tensors, steps = in_double(SD15.make()), tiny(), 4
    edit = from_checkpoint(File(tensors), pipe, mask=MASK, paper=True, **SIZES)
    assert edit.names == ("mask", "text") and edit.leader == "mask"
    got = draw(pipe, edit, prompts=["a red cat"], steps=steps, guidance=1.0, eta=1.0)
    network: dict[str, dict[str, Any]] = {}
    for kind in ("unet", "confidence_predictor"):
        network[kind] = {
            name: _of(Literal(part(tensors, f"model.{prefix}_{kind}.diffusion_model."), 2, 4))
            for name, prefix in (("mask", "seg_mask"), ("text", "text"))
        }
    ids = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 4, 4, 4], [0, 4, 4, 4]])
    one_hot = torch.stack([(ids == k).double().flatten() for k in range(5)])
    linear = part(tensors, "cond_stage_model.seg_mask_cond_stage_model.linear.")
    text, _ = pipe.encode_prompt("a red cat", "cpu", 1, False)
    conditions = {"mask": (one_hot @ linear["weight"].T + linear["bias"])[None], "text": text}
    loop = OfficialLoop(pipe.scheduler.alphas_cumprod, steps)
    want, maps = loop.run(network["unet"], network["confidence_predictor"], conditions, seed=0)
    assert relative(got, want) < 1e-10
    assert relative(edit.influence.of(0), maps) < 1e-10


def _of(literal: Literal) -> Callable[..., Any]:
    return lambda *given: SimpleNamespace(sample=literal(*given))


@pytest.mark.slow
def test_load_recognises_the_file(tmp_path: Path) -> None:
    """As a Lightning checkpoint and as safetensors."""
    pipe, tensors = SD15.make(), {k: t.float() for k, t in tiny(models=False).items()}
    torch.save({"state_dict": tensors, "global_step": 3}, tmp_path / "codiff.ckpt")
    save_file(tensors, tmp_path / "codiff.safetensors")
    drawn = [
        draw(pipe, load(tmp_path / name, pipe, mask=MASK, strength=0.5, **SIZES), steps=1)
        for name in ("codiff.ckpt", "codiff.safetensors")
    ]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], draw(pipe, steps=1))
    with pytest.raises(InputError, match="masks"):
        load(tmp_path / "codiff.ckpt", pipe, masks=MASK)


@pytest.mark.slow
def test_a_text_model_may_be_the_pipelines_own() -> None:
    pipe, tensors = SD15.make(), tiny(models=False)
    edit = from_checkpoint(File(tensors), pipe, mask=[MASK, MASK.rotate(90)], guided=True, **SIZES)
    text = edit.models[1]
    assert text.name == "text" and text.model is None
    got = draw(pipe, edit)
    assert torch.isfinite(got).all() and not torch.equal(got, draw(pipe))
    mask = edit.models[0]
    assert mask.condition is not None and mask.condition.shape == (2, 5, 32)
    assert mask.negative is not None and torch.equal(mask.negative[0, 0], mask.negative[0, 1])
    assert edit.influence.of(0).shape == (2, 2, 16, 16)
    # The weights follow the pipeline, though only matrices of the file are in half precision.
    mixed = {k: t.half() if t.dim() > 1 else t.float() for k, t in tensors.items()}
    edit = from_checkpoint(File(mixed), pipe, mask=[MASK, MASK.rotate(90)], guided=True, **SIZES)
    assert relative(draw(pipe, edit), got) < 1e-2
    for dtype in (torch.bfloat16, torch.float16):
        assert draw(SD15.make().to(dtype), edit).dtype == dtype


def test_masks_are_read_by_the_centres_of_cells(tmp_path: Path) -> None:
    vectors = mask_vectors(MASK, SIDE, 5)
    assert vectors.shape == (5, 16) and bool((vectors.sum(0) == 1).all())
    assert vectors[1].reshape(4, 4)[:2, :2].sum() == 4
    ids = torch.from_numpy(np.array(MASK))
    assert torch.equal(vectors, mask_vectors(ids, SIDE, 5))
    assert torch.equal(vectors, mask_vectors(MASK.convert("RGB"), SIDE, 5))
    palette = MASK.convert("P")
    palette.putpalette([255, 0, 0] * 256)
    palette.save(tmp_path / "mask.png")
    assert torch.equal(vectors, mask_vectors(tmp_path / "mask.png", SIDE, 5))


def _reads_text(key: str) -> bool:
    return key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) and "text" in key


def test_bad_input() -> None:
    pipe, tensors = SD15.make(), tiny()

    def refused(match: str, tensors: Mapping[str, Tensor] = tensors, **given: Any) -> None:
        with pytest.raises(InputError, match=match):
            from_checkpoint(File(tensors), pipe, **{"mask": MASK, **SIZES, **given})

    refused("holds no dynamic diffusers", {"a": torch.zeros(1)})
    refused("mask= is not given", mask=None)
    refused("mask holds the class 4, and this model knows 0 to 2", classes=3)
    refused("give whole numbers", mask=torch.rand(4, 4))
    refused("not of colours", mask=Image.effect_mandelbrot((8, 8), (0, 0, 1, 1), 9).convert("HSV"))
    refused("mask='none.png' can't be read as an image", mask="none.png")
    refused("strength=2", strength=2)
    one = "model.text_unet.diffusion_model.middle_block.1.proj_out.weight"
    cut = {k: v for k, v in tensors.items() if k != one}
    refused("model.text_unet: 'mid_block.attentions.0.proj_out.weight', of shape .* is not in", cut)
    wide = {**tensors, one: torch.zeros(16, 8, 1, 1)}
    refused(r"\(16, 8, 1, 1\) in the file, and \(16, 16, 1, 1\) is needed", wide)
    no_layer = {k: v for k, v in tensors.items() if "cond_stage_model" not in k}
    refused("holds no linear layer", no_layer)
    few = {k: v for k, v in tensors.items() if "text_unet" not in k or "output" in k}
    refused("are no LDM UNet", few)
    other = {k: v[:, :16] if _reads_text(k) else v for k, v in tensors.items()}
    edit = from_checkpoint(File(other), pipe, mask=MASK, **SIZES)
    with pytest.raises(InputError, match="takes a condition of 16 channels, and it is given"):
        draw(pipe, edit)
