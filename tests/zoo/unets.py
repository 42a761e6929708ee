"""Image pipelines with a UNet: SD1.5, SDXL, ControlNet, PAG, InstructPix2Pix."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from .case import Asked, Case, Rows, labels, negative_first, of_text
from .text import clip_encoder, clip_tokenizer

PIXELS = 128  # a latent of 16 x 16
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def autoencoder(channels: int = 4, **kwargs: Any) -> AutoencoderKL:
    """An autoencoder that shrinks each side by 8, as all the published ones do."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=PIXELS,
        **kwargs,
    ).eval()


def ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


SD15 = {
    "sample_size": 16,
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 2, 4, 4),  # the number of heads, under the name it has in diffusers
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
}


def sd15_unet(in_channels: int = 4) -> UNet2DConditionModel:
    """Attention at 16 x 16, 8 x 8, 4 x 4 and, in the middle, 2 x 2."""
    up = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    return UNet2DConditionModel(in_channels=in_channels, up_block_types=up, **SD15).eval()


def sd15_parts(in_channels: int = 4) -> dict[str, Any]:
    return {
        "vae": autoencoder(),
        "text_encoder": clip_encoder(),
        "tokenizer": clip_tokenizer(),
        "unet": sd15_unet(in_channels),
        "scheduler": ddim(),
        **UNCHECKED,
    }


def build_sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**sd15_parts())


def build_sd15_pag() -> StableDiffusionPAGPipeline:
    return StableDiffusionPAGPipeline(**sd15_parts(), pag_applied_layers=["mid"])


def build_controlnet() -> StableDiffusionControlNetPipeline:
    parts = sd15_parts()
    layout = {k: v for k, v in SD15.items() if k != "sample_size"}
    net = ControlNetModel(conditioning_embedding_out_channels=(4, 4, 4, 4), **layout)
    with torch.no_grad():  # its exits start at zero: without this it would change nothing
        exits = [*net.controlnet_down_blocks, net.controlnet_mid_block]
        for layer in [*exits, net.controlnet_cond_embedding.conv_out]:
            nn.init.normal_(layer.weight, std=0.2)
    return StableDiffusionControlNetPipeline(controlnet=net.eval(), **parts)


def build_instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    return StableDiffusionInstructPix2PixPipeline(**sd15_parts(in_channels=8))


def build_sdxl() -> StableDiffusionXLPipeline:
    """No attention at the full resolution, two blocks deep below, as in SDXL."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24 + 32,
        attention_head_dim=(2, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(24),
        text_encoder_2=clip_encoder(32, pooled=20),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )


def image(text: str, size: int = PIXELS) -> Tensor:
    """(3, size, size) in [0, 1]: an image that belongs to a text."""
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    return torch.rand(3, size, size, generator=generator)


def of_controlnet(asked: Asked) -> dict[str, Any]:
    """Each prompt comes with an image of its own."""
    return {**of_text(asked), "image": torch.stack([image(prompt) for prompt in asked.prompts])}


def of_instruct(asked: Asked) -> dict[str, Any]:
    """The same, one image for each image: fewer are tiled, which would mix up the prompts."""
    images = [image(prompt) for prompt in asked.prompts for _ in range(asked.n)]
    return {**of_text(asked), "image": torch.stack(images)}


def pag_rows(prompts: int, n: int, guided: bool) -> Rows:
    """N P X: the perturbed rows follow the conditional ones."""
    [rows] = negative_first(prompts, n, guided)
    return [[*rows, *labels("X", prompts, n)]]


def instruct_rows(prompts: int, n: int, guided: bool) -> Rows:
    """P I N: with text and image, with the image alone, with neither."""
    return [[row for role in ("PIN" if guided else "P") for row in labels(role, prompts, n)]]


SD15_SITES = {"self": 10, "cross": 10}
SD15_EXAMPLES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1": "self",
    "down_blocks.2.attentions.0.transformer_blocks.0.attn2": "cross",
    "mid_block.attentions.0.transformer_blocks.0.attn1": "self",
    "up_blocks.3.attentions.1.transformer_blocks.0.attn2": "cross",
}

CASES = (
    Case("sd15", build_sd15, of_text, SD15_SITES, SD15_EXAMPLES),
    Case(
        "sdxl",
        build_sdxl,
        of_text,
        # down: 1 + 2 deep, middle: 2 deep, up: 2 x 2 deep + 2 x 1 deep
        sites={"self": 11, "cross": 11},
        examples={
            "down_blocks.2.attentions.0.transformer_blocks.1.attn1": "self",
            "up_blocks.0.attentions.1.transformer_blocks.1.attn2": "cross",
        },
        notes="the keys of cross-attention are two encoders side by side, 77 tokens in all",
    ),
    Case(
        "controlnet",
        build_controlnet,
        of_controlnet,
        SD15_SITES,
        SD15_EXAMPLES,
        notes="pipe.controlnet has 8 attention modules of its own, which are no sites",
    ),
    Case(
        "sd15_pag",
        build_sd15_pag,
        of_text,
        SD15_SITES,
        SD15_EXAMPLES,
        rows=pag_rows,
        notes="sets its own processors on the middle block while it runs",
    ),
    Case(
        "instruct_pix2pix",
        build_instruct_pix2pix,
        of_instruct,
        SD15_SITES,
        SD15_EXAMPLES,
        rows=instruct_rows,
        notes="I and N share the negative's text; they differ in the latent's last 4 channels",
    ),
)
