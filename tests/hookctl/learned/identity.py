"""Tiny pipelines and adapters in the official key layouts, with random values."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

import hookctl
from hookctl.learned.adapter import Adapter, adapter_of
from hookctl.learned.modules.image_projection import (
    FacePlusProjection,
    FaceProjection,
    FullProjection,
    ImageProjection,
)
from hookctl.learned.modules.resampler import Resampler
from hookctl.learned.names import adapter_layers
from tests.zoo.unets import build_sd15, build_sdxl

Tensors = dict[str, Tensor]
RANK = 3
STEPS, PIXELS = 2, 128


def pipeline(kind: str = "sd15") -> Any:
    torch.manual_seed(1)
    pipe = build_sd15() if kind == "sd15" else build_sdxl()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, *editors: Any, prompt: Any = "a red circle", **options: Any) -> Tensor:
    """Latents of a short run with some editors."""
    given = {"num_inference_steps": STEPS, "height": PIXELS, "width": PIXELS, **options}
    generator = torch.Generator().manual_seed(0)
    with hookctl.control(pipe, *editors):
        out = pipe(prompt, generator=generator, output_type="latent", **given)
    found: Tensor = out.images
    return found


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def projection(kind: str, text: int, **sizes: Any) -> nn.Module:
    """A projection in the sizes of these tests: images of 10 channels, faces of 6."""
    if kind == "base":
        return ImageProjection(10, text)
    if kind == "full":
        return FullProjection(10, text)
    if kind == "plus":
        return Resampler(16, text, 10, heads=1, tokens=5, **sizes)
    if kind == "faceid":
        return FaceProjection(6, text)
    if kind == "instantid":
        return Resampler(16, text, 6, heads=1, tokens=5, **sizes)
    return FacePlusProjection(6, 10, text, heads=1, **sizes)


def tensors(kind: str, unet: Any, seed: int = 0) -> Tensors:
    """A file of a kind for a UNet: flat names, as a checkpoint has them."""
    text = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, by: float = 0.3) -> Tensor:
        return torch.randn(shape, generator=generator) * by

    found = {
        f"image_proj.{name}": random(*x.shape)
        for name, x in projection(kind, text).state_dict().items()
    }
    for i, path in adapter_layers(unet).items():
        attention = unet.get_submodule(path)
        if attention.is_cross_attention:
            for part in ("k", "v"):
                found[f"ip_adapter.{i}.to_{part}_ip.weight"] = random(attention.inner_dim, text)
        if not kind.startswith("faceid"):
            continue
        for part in ("q", "k", "v", "out"):
            layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
            start = f"ip_adapter.{i}.to_{part}_lora"
            found[f"{start}.down.weight"] = random(RANK, layer.in_features)
            found[f"{start}.up.weight"] = random(layer.out_features, RANK, by=0.1)
    return found


def adapter(kind: str, unet: Any, seed: int = 0, **options: Any) -> Adapter:
    return adapter_of(tensors(kind, unet, seed), **options)


def load_into_diffusers(pipe: Any, *files: Tensors) -> None:
    """Load files by diffusers' own loader."""
    nested = []
    for file in files:
        parts: dict[str, Tensors] = {"image_proj": {}, "ip_adapter": {}}
        for name, x in file.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = x.clone()
        nested.append(parts)
    many = [None] * len(nested)
    pipe.load_ip_adapter(nested, subfolder=many, weight_name=many, image_encoder_folder=None)


def embeds(*images: Tensor, negative: Tensor | None = None) -> Tensor:
    """Images of one adapter as diffusers takes them: [negative | images], each [1, images, ...]."""
    shown = torch.stack(images)[None]
    nothing = torch.zeros_like(shown) if negative is None else negative.expand_as(shown)
    return torch.cat([nothing, shown])


def identity_net(unet: Any, seed: int = 0) -> ControlNetModel:
    """A ControlNet of a UNet's layout, with random values also where it starts at zero."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    with torch.no_grad():
        for layer in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
            nn.init.normal_(layer.weight, std=0.2)
        for name, parameter in net.controlnet_cond_embedding.named_parameters():
            if name.endswith("weight"):  # as they start, the picture would hardly matter
                nn.init.normal_(parameter, std=0.5)
    return net.eval()
