"""diffusers' own gated UNet, and a plain one of the same weights with the gated layers apart."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from hookctl.learned.gligen import GLIGENNetwork
from hookctl.learned.modules.gated_attention import GatedSelfAttention
from hookctl.learned.modules.gligen_tokens import BoxText
from tests.hookctl.drawing import SD15
from tests.hookctl.learned.literal_grounding import randomise
from tests.zoo.unets import SD15 as CONFIG

WIDTH = CONFIG["cross_attention_dim"]


def gated_unet(in_channels: int = 4) -> UNet2DConditionModel:
    """With open gates, and the weights of the plain one for the rest."""
    up = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    net = UNet2DConditionModel(
        in_channels=in_channels, up_block_types=up, attention_type="gated", **CONFIG
    )
    plain = SD15.make().unet.state_dict()
    if in_channels != 4:
        first = plain.pop("conv_in.weight")
        net.conv_in.weight.data = 0.2 * torch.randn(
            (first.shape[0], in_channels, 3, 3), generator=torch.Generator().manual_seed(3)
        )
        net.conv_in.weight.data[:, :4] = first
    missing, unexpected = net.load_state_dict(plain, strict=False)
    assert not unexpected
    learned = [name for name in missing if "fuser" in name or name.startswith("position_net")]
    assert learned and len(learned) + (in_channels != 4) == len(missing)
    return _random(net)


def gated_like(plain: UNet2DConditionModel) -> UNet2DConditionModel:
    """A gated one of another's layout and weights."""
    net = UNet2DConditionModel.from_config(plain.config, attention_type="gated")
    assert not net.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    return _random(net)


def _random(net: UNet2DConditionModel) -> UNet2DConditionModel:
    randomise(net.position_net, 1)
    for i, (_, fuser) in enumerate(sorted(fusers_in(net).items())):
        randomise(fuser, 2 + i)
    return net.eval().requires_grad_(False)


def fusers_in(net: nn.Module) -> dict[str, Any]:
    """diffusers' gated layers by the path of their block."""
    return {
        path.removesuffix(".fuser"): module
        for path, module in net.named_modules()
        if path.endswith(".fuser")
    }


def fusers_of(net: nn.Module) -> dict[str, GatedSelfAttention]:
    """Our layers with the weights of diffusers'."""
    found = {}
    for path, theirs in fusers_in(net).items():
        width = theirs.norm1.normalized_shape[0]
        heads = net.get_submodule(path).attn1.heads
        layer = GatedSelfAttention(width, theirs.linear.in_features, heads)
        layer.load_state_dict(theirs.state_dict())
        found[path] = layer
    return found


def network_of(net: UNet2DConditionModel, **more: Any) -> GLIGENNetwork:
    """Our box and text network with the weights of diffusers'."""
    theirs = net.position_net.state_dict()
    tokenizer = BoxText.of_shapes({name: tuple(value.shape) for name, value in theirs.items()})
    tokenizer.load_state_dict(theirs)
    return GLIGENNetwork(tokenizer, fusers_of(net), **more)
