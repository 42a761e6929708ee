"""Official checkpoints of grounding, name by name at their full size, and whole files of tiny ones
in the official layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

import hookctl
from hookctl.hooks.skips import concats
from hookctl.learned import Instance, load
from hookctl.learned.files import Checkpoint
from hookctl.learned.gligen import build, tokenizer_of
from hookctl.learned.instance_diffusion import InstanceDiffusion
from hookctl.learned.modules.convnext import ConvNeXt
from hookctl.learned.modules.gligen_tokens import (
    BoxText,
    BoxTextImage,
    Downsampler,
    Keypoints,
    SpatialMap,
)
from hookctl.learned.modules.scale_u import ScaleU
from hookctl.learned.modules.unifusion import UniFusion
from hookctl.learned.names import ldm_to_diffusers, official
from hookctl.learned.networks import filled, fusers_of, part
from tests.families.subjects import error
from tests.hookctl.drawing import SD15
from tests.hookctl.learned import ldm
from tests.hookctl.learned.gated_models import WIDTH
from tests.hookctl.learned.literal_grounding import randomise

FORMS = {
    "text": BoxText,
    "text+image": BoxTextImage,
    "keypoint": Keypoints,
    "canny": SpatialMap,
    "hed": SpatialMap,
    "semantic": SpatialMap,
    "inpainting": BoxText,
}


@cache
def stable_diffusion() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def by_our_names(shapes: ldm.Shapes) -> dict[str, Tensor]:
    given = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return official(given)[0]


def millions(*modules: Any) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_gligen_at_full_size(form: str) -> None:
    tensors = by_our_names(ldm.gligen(form))
    position = part(tensors, "position_net.")
    tokenizer = tokenizer_of(position)
    assert type(tokenizer) is FORMS[form]
    default = type(tokenizer)(classes=152) if form == "semantic" else type(tokenizer)()
    for net in (tokenizer, default):
        assert {k: v.shape for k, v in net.state_dict().items()} == {
            k: v.shape for k, v in position.items()
        }
    fusers = fusers_of(tensors, stable_diffusion())
    assert len(fusers) == 16 and round(millions(*fusers.values()), 2) == 208.02
    assert all(layer.attn.heads == 8 for layer in fusers.values())
    below = part(tensors, "downsample_net.")
    if below:
        filled(Downsampler.of_shapes, below, "downsample_net")
    stem = tensors.get("conv_in.weight")
    further = 0 if stem is None else stem.shape[1] - 4
    assert further == {"canny": 8, "semantic": 8, "hed": 1, "inpainting": 5}.get(form, 0)


@pytest.mark.slow
def test_instance_diffusion_at_full_size() -> None:
    tensors = by_our_names(ldm.instance_diffusion())
    tokenizer = filled(UniFusion.of_shapes, part(tensors, "position_net."), "position_net")
    fusers = fusers_of(tensors, stable_diffusion())
    gains = filled(
        ScaleU.of_shapes, {k: t for k, t in tensors.items() if k.startswith("scaleu_")}, "ScaleU"
    )
    assert gains.widths == tuple(c.backbone_channels for c in concats(stable_diffusion()))
    assert round(millions(tokenizer), 1) == 160.8 and tokenizer.side == 512
    assert round(millions(*fusers.values()), 2) == 208.02 and round(millions(gains), 4) == 0.0115
    used = sum(len(m.state_dict()) for m in (tokenizer, *fusers.values(), gains))
    assert used == len(tensors)  # nothing of what was learned is left out
    assert len(tensors) + len(ldm.unet(ldm.SD15)) == 1199


# -- files -----------------------------------------------------------------------------------------

TINY = ldm.Layout(16, (1, 2), (1, 1), 1, WIDTH, fusers=WIDTH)


@cache
def tiny_pipe() -> Any:
    """A pipeline whose UNet has as many layers in a block as the official one."""
    pipe = SD15.make()
    cross = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=2,
            cross_attention_dim=WIDTH, attention_head_dim=2,
            down_block_types=cross[:1] * 2, up_block_types=cross[1:] * 2,
        ).eval()  # fmt: skip
    return pipe


def numbers(shapes: ldm.Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for key, shape in shapes.items():
        size = shape[1:] if len(shape) > 1 else ()
        found[key] = (
            torch.randn(shape, generator=generator) / max(1, torch.Size(size).numel()) ** 0.5
        )
    return found


@pytest.mark.slow
def test_a_training_file_of_instance_diffusion_is_drawn_with(tmp_path: Path) -> None:
    """LDM's names, the averaged weights beside the others, a step count: as it is published."""
    pipe = tiny_pipe()
    tokenizer = UniFusion(
        ConvNeXt((1, 1), (4, 6)), text=WIDTH, hidden=16, out=WIDTH, slots=3, frequencies=2,
        scribble_points=2, mask_points=4, raster_tokens=4, features=6,
    )  # fmt: skip
    randomise(tokenizer, 1)
    gains = randomise(ScaleU([c.backbone_channels for c in concats(pipe.unet)]), 2)
    learned = {f"position_net.{k}": v for k, v in tokenizer.state_dict().items()}
    learned |= gains.state_dict()
    averaged = numbers(ldm.unet(TINY)) | learned
    trained = {key: torch.zeros_like(tensor) for key, tensor in averaged.items()}
    path = tmp_path / "instancediffusion.pth"
    torch.save({"model": trained, "ema": averaged, "iters": 7}, path)
    instances = [Instance("a red cat", box=(0.1, 0.2, 0.5, 0.6))]
    editor = load(path, pipe, instances=instances, stop=1.0)
    assert isinstance(editor, InstanceDiffusion)
    for key, tensor in averaged.items():
        place, found, name = ldm_to_diffusers(key).partition(".fuser.")
        if found:
            assert torch.equal(editor.fusers[place].module.state_dict()[name], tensor)
    plain = SD15.run(pipe)
    with hookctl.control(pipe, editor):
        got = SD15.run(pipe)
    assert error(got, plain) > 1e-3
    with hookctl.control(pipe, load(path, pipe, weights="model", instances=instances)):
        assert torch.equal(SD15.run(pipe), plain)  # all of these are zero


@pytest.mark.slow
def test_inpainting_weights_in_official_names(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    tokenizer = randomise(BoxText(WIDTH, 16, WIDTH), 1)
    learned = {f"position_net.{k}": v for k, v in tokenizer.state_dict().items()}
    tensors = numbers(ldm.unet(replace(TINY, inputs=9))) | learned
    editor_of = {"boxes": [(0.1, 0.2, 0.5, 0.6)], "phrases": ["a red cat"]}
    held = Checkpoint(tmp_path, official(tensors)[0])
    editor = build(held, pipe, inpaint=Image.new("RGB", (128, 128)), **editor_of)
    with hookctl.control(pipe, editor):
        got = SD15.run(pipe)
    assert error(got, SD15.run(pipe)) > 1e-3
