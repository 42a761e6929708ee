"""The layers of an adapter: numbers, official full shapes, what does not fit and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hookctl.errors import InputError
from hookctl.learned.adapter import adapter_for, adapter_of, check_fit, layers_of
from hookctl.learned.modules.image_projection import ImageProjection
from hookctl.learned.names import adapter_layers
from tests.hookctl.learned import identity
from tests.hookctl.learned.identity import tensors

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Number of the first cross-attention of every attention module.
FIRST = {
    "sd15": {
        "down_blocks.0.attentions.0": 1,
        "down_blocks.0.attentions.1": 3,
        "down_blocks.1.attentions.0": 5,
        "down_blocks.2.attentions.1": 11,
        "up_blocks.1.attentions.0": 13,
        "up_blocks.1.attentions.2": 17,
        "up_blocks.2.attentions.0": 19,
        "up_blocks.3.attentions.2": 29,
        "mid_block.attentions.0": 31,
    },
    "sdxl": {
        "down_blocks.1.attentions.0": 1,
        "down_blocks.1.attentions.1": 5,
        "down_blocks.2.attentions.0": 9,
        "down_blocks.2.attentions.1": 29,
        "up_blocks.0.attentions.0": 49,
        "up_blocks.0.attentions.1": 69,
        "up_blocks.0.attentions.2": 89,
        "up_blocks.1.attentions.0": 109,
        "up_blocks.1.attentions.2": 117,
        "mid_block.attentions.0": 121,
    },
}


def full_size(kind: str) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(**(SD15 if kind == "sd15" else SDXL))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers", "millions"), [("sd15", 16, 19.17), ("sdxl", 70, 340.8)])
def test_official_numbers_and_shapes(kind: str, layers: int, millions: float) -> None:
    unet = full_size(kind)
    numbers = adapter_layers(unet)
    for module, first in FIRST[kind].items():
        assert numbers[first] == f"{module}.transformer_blocks.0.attn2"
        assert numbers[first - 1] == f"{module}.transformer_blocks.0.attn1"
    assert len(numbers) == 2 * layers
    channels = {
        path.split(".attn")[0]: unet.get_submodule(path).inner_dim for path in numbers.values()
    }
    assert len(channels) == layers
    shapes = {
        f"{i}.to_{part}_ip.weight": (
            unet.get_submodule(path).inner_dim,
            768 if kind == "sd15" else 2048,
        )
        for i, path in numbers.items()
        if path.endswith("attn2")
        for part in "kv"
    }
    assert sorted({int(name.split(".")[0]) for name in shapes}) == list(range(1, 2 * layers, 2))
    made = layers_of(shapes)
    assert {name: tuple(x.shape) for name, x in made.state_dict().items()} == shapes
    assert sum(x.numel() for x in made.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_native_adapter_does_not_shift_the_numbers() -> None:
    pipe = identity.pipeline()
    before = adapter_layers(pipe.unet)
    identity.load_into_diffusers(pipe, tensors("plus", pipe.unet))
    assert adapter_layers(pipe.unet) == before


def test_an_untrained_adapter_copies_the_texts_projections() -> None:
    unet = identity.pipeline().unet
    made = adapter_for(unet, ImageProjection(10, 32))
    check_fit(made, unet, "test")
    attention = unet.get_submodule(adapter_layers(unet)[1])
    assert torch.equal(made.layer("1")["to_k_ip"].weight, attention.to_k.weight)
    assert made.layer("1")["to_k_ip"].weight is not attention.to_k.weight
    again = adapter_of(made.state_dict())
    assert again.state_dict().keys() == made.state_dict().keys()


def test_a_file_is_kept_in_float32() -> None:
    unet = identity.pipeline().unet
    half = {name: x.half() for name, x in tensors("base", unet).items()}
    assert all(x.dtype == torch.float32 for x in adapter_of(half).state_dict().values())


# -- refusals --------------------------------------------------------------------------------------


def without(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x for name, x in given.items() if name not in names}


def test_what_is_refused() -> None:
    unet = identity.pipeline().unet
    given = tensors("base", unet)
    with pytest.raises(InputError, match="the file has no image_proj"):
        adapter_of({k: x for k, x in given.items() if k.startswith("ip_adapter")})
    with pytest.raises(
        InputError, match=r"'image_proj.proj.bias' has the shape \(3,\) in the file, and \(128,\)"
    ):
        adapter_of(given | {"image_proj.proj.bias": torch.ones(3)})
    with pytest.raises(InputError, match="'image_proj.norm.bias', of shape .* is not in the file"):
        adapter_of(without(given, "image_proj.norm.bias"))
    with pytest.raises(InputError, match="ip_adapter.1.to_k_ip.bias"):
        adapter_of(given | {"ip_adapter.1.to_k_ip.bias": torch.ones(3)})


def test_what_does_not_fit_the_model() -> None:
    unet = identity.pipeline().unet
    given = tensors("base", unet)
    with pytest.raises(InputError, match="ip_adapter.3.to_v_ip.weight is missing, but this UNet"):
        check_fit(adapter_of(without(given, "ip_adapter.3.to_v_ip.weight")), unet, "A")
    with pytest.raises(InputError, match=r"A: ip_adapter.45.to_k_ip.weight .* is of no layer"):
        further = {f"ip_adapter.45.to_{n}_ip.weight": torch.ones(2, 32) for n in "kv"}
        check_fit(adapter_of(given | further), unet, "A")
    with pytest.raises(InputError, match="makes tokens of 40 channels, but"):
        wide = {f"image_proj.{k}": x for k, x in ImageProjection(10, 40).state_dict().items()}
        layers = {k: x for k, x in given.items() if k.startswith("ip_adapter")}
        check_fit(adapter_of(wide | layers), unet, "A")
