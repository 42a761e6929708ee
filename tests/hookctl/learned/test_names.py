"""Names at official sizes: every weight of a file is found in diffusers' model, with its shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNetMotionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
)

from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.names import adapter_layers, ldm_to_diffusers, official
from tests.hookctl.learned import ldm

SD15: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
}
SD15_UP = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
}
SDXL_UP = (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D")


def faces(channels: int, outputs: int) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": outputs,
        "block_out_channels": tuple(channels * n for n in (1, 2, 3, 5)),
        "cross_attention_dim": 640,
        "attention_head_dim": 32,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    }


def empty(cls: type[Any], **config: Any) -> Any:
    with torch.device("meta"):
        return cls(**config)


def shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def tensors(of: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in of.items()}


CASES: dict[str, tuple[Any, Any, int]] = {
    "SD1.5": (
        ldm.unet(ldm.SD15),
        lambda: empty(UNet2DConditionModel, up_block_types=SD15_UP, **SD15),
        686,
    ),
    "SD1.5 with fusers": (
        {k: s for k, s in ldm.gligen().items() if not k.startswith("position_net")},
        lambda: empty(UNet2DConditionModel, up_block_types=SD15_UP, attention_type="gated", **SD15),
        686 + 16 * 17,
    ),
    "SDXL": (
        ldm.unet(ldm.SDXL),
        lambda: empty(UNet2DConditionModel, up_block_types=SDXL_UP, **SDXL),
        1680,
    ),
    "Collaborative Diffusion": (
        ldm.unet(ldm.FACES),
        lambda: empty(UNet2DConditionModel, **faces(192, 3)),
        688,
    ),
    "a dynamic diffuser": (
        ldm.unet(ldm.PREDICTOR),
        lambda: empty(UNet2DConditionModel, **faces(32, 1)),
        688,
    ),
    "ControlNet of SD1.5": (ldm.controlnet(ldm.SD15), lambda: empty(ControlNetModel, **SD15), 340),
    "ControlNet of SDXL": (ldm.controlnet(ldm.SDXL), lambda: empty(ControlNetModel, **SDXL), 844),
}


@pytest.mark.parametrize("name", CASES)
def test_every_weight_at_full_size(name: str) -> None:
    given, make, count = CASES[name]
    named = {ldm_to_diffusers(key): shape for key, shape in given.items()}
    wanted = {
        key: shape for key, shape in shapes(make()).items() if not key.startswith("position_net")
    }
    assert named == wanted
    assert len(named) == len(given) == count
    # Names of diffusers stay as they are.
    assert {ldm_to_diffusers(key) for key in named} == set(named)


@pytest.mark.parametrize("name", ["SD1.5", "SDXL", "ControlNet of SD1.5"])
def test_the_same_as_diffusers_own_conversion(name: str) -> None:
    """Shapes alone would not tell to_q from to_k, or one norm from another."""
    given, make, _ = CASES[name]
    made = tensors(given)
    convert = convert_ldm_unet_checkpoint
    prefix = "model.diffusion_model."
    if name.startswith("ControlNet"):
        convert, prefix = convert_controlnet_checkpoint, "control_model."
    theirs = convert({f"{prefix}{key}": tensor for key, tensor in made.items()}, make().config)
    ours = {ldm_to_diffusers(key): tensor for key, tensor in made.items()}
    assert set(ours) == set(theirs)
    assert all(ours[key] is tensor for key, tensor in theirs.items())


def test_another_number_of_layers() -> None:
    of = ldm.Layout(64, (1, 2), (1, 0), 1, 96, layers=3)
    unet = empty(
        UNet2DConditionModel,
        block_out_channels=(64, 128),
        layers_per_block=3,
        cross_attention_dim=96,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    assert {ldm_to_diffusers(k, 3): s for k, s in ldm.unet(of).items()} == shapes(unet)


@pytest.mark.parametrize(
    "key",
    [
        "position_net.linears.0.weight",
        "scaleu_b_0",
        "input_blocks.0.1.weight",
        "input_blocks.x.0.weight",
        "output_blocks.2.3.conv.weight",
        "middle_block.3.weight",
        "down_blocks.0.resnets.0.norm1.weight",
        "out",
        "",
    ],
)
def test_other_names_stay(key: str) -> None:
    assert ldm_to_diffusers(key) == key


# -- adapters --------------------------------------------------------------------------------------


def test_layers_of_sd15() -> None:
    layers = adapter_layers(CASES["SD1.5"][1]())
    assert len(layers) == 32
    cross = {i: path for i, path in layers.items() if path.endswith("attn2")}
    assert list(cross) == list(range(1, 32, 2))
    block = "attentions.{}.transformer_blocks.0.attn2"
    wanted = [f"down_blocks.{i}.{block.format(j)}" for i in range(3) for j in range(2)]
    wanted += [f"up_blocks.{i}.{block.format(j)}" for i in (1, 2, 3) for j in range(3)]
    assert list(cross.values()) == [*wanted, f"mid_block.{block.format(0)}"]


def test_layers_of_sdxl() -> None:
    layers = adapter_layers(CASES["SDXL"][1]())
    starts = {
        1: "down_blocks.1.attentions.0", 5: "down_blocks.1.attentions.1",
        9: "down_blocks.2.attentions.0", 29: "down_blocks.2.attentions.1",
        49: "up_blocks.0.attentions.0", 69: "up_blocks.0.attentions.1",
        89: "up_blocks.0.attentions.2", 109: "up_blocks.1.attentions.0",
        113: "up_blocks.1.attentions.1", 117: "up_blocks.1.attentions.2",
        121: "mid_block.attentions.0",
    }  # fmt: skip
    for i, path in starts.items():
        assert layers[i] == f"{path}.transformer_blocks.0.attn2"
    assert layers[139] == "mid_block.attentions.0.transformer_blocks.9.attn2"
    assert len(layers) == 140


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_layers_have_the_widths_of_the_adapter(name: str) -> None:
    unet = CASES[name][1]()
    of = {"SD1.5": ldm.SD15, "SDXL": ldm.SDXL}[name]
    file = ldm.ip_adapter(of, {})
    for i, path in adapter_layers(unet).items():
        if path.endswith("attn2"):
            shape = tuple(unet.get_submodule(path).to_k.weight.shape)
            assert file[f"ip_adapter.{i}.to_k_ip.weight"] == shape, path


def test_layers_of_a_video_model() -> None:
    """Those of frames are not counted."""
    unet = empty(
        UNetMotionModel,
        block_out_channels=(32, 64),
        cross_attention_dim=96,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
    )
    layers = adapter_layers(unet)
    at = "attentions.{}.transformer_blocks.0.attn"
    wanted = [f"down_blocks.0.{at.format(j)}{n}" for j in (0, 1) for n in (1, 2)]
    wanted += [f"up_blocks.1.{at.format(j)}{n}" for j in (0, 1, 2) for n in (1, 2)]
    wanted += [f"mid_block.{at.format(0)}{n}" for n in (1, 2)]
    assert layers == dict(enumerate(wanted))


def test_a_denoiser_without_numbers() -> None:
    with pytest.raises(UnsupportedError, match="Linear has no cross-attention that IP-Ad"):
        adapter_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("form", ["both", "without adapter_modules", "without the UNet's"])
@pytest.mark.parametrize("rank", [0, 8])
def test_raw_training_output(form: str, rank: int) -> None:
    """`image_proj_model.*`, and layers by place (`unet.*`), by number (adapter_modules) or both."""
    unet = CASES["SD1.5"][1]()
    wanted = tensors(ldm.ip_adapter(ldm.SD15, ldm.projection(1024, 768), rank))
    layers = adapter_layers(unet)
    raw: dict[str, torch.Tensor] = {}
    for key, tensor in wanted.items():
        part, _, rest = key.partition(".")
        if part == "image_proj":
            raw[f"image_proj_model.{rest}"] = tensor
            continue
        number, _, name = rest.partition(".")
        if form != "without adapter_modules":
            raw[f"adapter_modules.{rest}"] = tensor
        if form != "without the UNet's":
            raw[f"unet.{layers[int(number)]}.processor.{name}"] = tensor
    raw |= {f"unet.{key}": tensor for key, tensor in unet.state_dict().items()}
    raw = dict(sorted(raw.items()))  # alphabetical: the middle stands before up
    named, notes = official(raw, layers)
    assert set(named) == set(wanted)
    assert all(named[key] is tensor for key, tensor in wanted.items())
    assert notes == [
        "the names are those of training (accelerate)",
        "left out: 686 tensors of the frozen base model",
    ]


def test_raw_training_output_of_another_model() -> None:
    raw = {
        "image_proj_model.norm.bias": torch.ones(2),
        "unet.down_blocks.9.attn2.processor.to_k_ip.weight": torch.ones(2),
    }
    with pytest.raises(InputError, match="no attention layer down_blocks.9.attn2; the adapter was"):
        official(raw, {1: "mid_block.attn2"})
    assert "unet.down_blocks.9.attn2.processor.to_k_ip.weight" in official(raw)[0]


# -- grounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "stem"), [("text", None), ("canny", 12), ("hed", 5), ("inpainting", 9)]
)
def test_the_frozen_base_is_left_out(form: str, stem: int | None) -> None:
    given = ldm.gligen(form)
    named, notes = official(tensors(given))
    outside = {key for key in given if key.startswith(("position_net.", "downsample_net."))}
    fusers = {ldm_to_diffusers(key) for key in given if ".fuser." in key}
    stems = {"conv_in.weight", "conv_in.bias"} if stem else set()
    assert set(named) == outside | fusers | stems
    assert len(fusers) == 16 * 17
    if stem:
        assert named["conv_in.weight"].shape == (320, stem, 3, 3)
    assert notes == [f"left out: {686 - len(stems)} tensors of the frozen base model"]
    # The form of diffusers is the same.
    again, _ = official({ldm_to_diffusers(k): t for k, t in tensors(given).items()})
    assert set(again) == set(named)


def test_instance_diffusion_whole_and_split() -> None:
    given = tensors(ldm.instance_diffusion())
    assert len(given) == 1199
    whole, _ = official(given)
    split: dict[str, torch.Tensor] = {}
    for key, tensor in given.items():
        if ".fuser." in key:
            block, number, rest = key.split(".", 2)
            place = "1" if block == "middle_block" else number
            split[f"{block}.{place}.state.{rest.partition('.fuser.')[2]}"] = tensor
        elif key.startswith("scaleu_"):
            _, part, number = key.split("_")
            split[f"{number}.scaleu_{part}"] = tensor
        elif key.startswith("position_net."):
            split[key.removeprefix("position_net.")] = tensor
    named, notes = official(split)
    assert set(named) == set(whole) and all(named[key] is whole[key] for key in whole)
    assert notes == ["the names are those of ComfyUI's split of InstanceDiffusion"]
    with pytest.raises(InputError, match="SD1.x has 1 transformers in its middle_block"):
        official(tensors({f"middle_block.{k}.state.alpha_attn": () for k in range(2)}))


def test_two_layouts_in_one_file() -> None:
    both = tensors({"input_blocks.0.0.weight": (320, 4, 3, 3), "conv_in.weight": (320, 4, 3, 3)})
    with pytest.raises(InputError, match="two weights are both conv_in.weight"):
        official(both)
