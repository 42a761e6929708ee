"""Video pipelines with a UNet: AnimateDiff and Stable Video Diffusion."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from .case import Asked, Case, of_text
from .text import clip_encoder, clip_tokenizer
from .unets import autoencoder, ddim, image

FRAMES = 3
SIDE = 64  # pixels; a latent of 8 x 8


def build_animatediff() -> AnimateDiffPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    return AnimateDiffPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet.eval(),
        motion_adapter=adapter.eval(),
        scheduler=ddim(),
    )


def build_svd() -> StableVideoDiffusionPipeline:
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=FRAMES,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32),  # its norms have 32 groups
        down_block_types=("DownEncoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,  # to which the pipeline brings every image
        patch_size=56,
    )
    return StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
    )


def of_animatediff(asked: Asked) -> dict[str, Any]:
    return {**of_text(asked), "num_frames": FRAMES}


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray((255 * image.permute(1, 2, 0)).byte().numpy())


def of_svd(asked: Asked) -> dict[str, Any]:
    """A prompt stands for the image that belongs to it; there are no negatives."""
    return {
        "image": [_pil(image(prompt, SIDE)) for prompt in asked.prompts],
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "max_guidance_scale": asked.guidance,
    }


DOWN = "down_blocks.0.attentions.0"

CASES = (
    Case(
        "animatediff",
        build_animatediff,
        of_animatediff,
        # one spatial transformer down, one in the middle, two up; a motion module at every place
        sites={"self": 4, "cross": 4, "temporal": 14},
        examples={
            f"{DOWN}.transformer_blocks.0.attn1": "self",
            f"{DOWN}.transformer_blocks.0.attn2": "cross",
            "down_blocks.1.motion_modules.0.transformer_blocks.0.attn1": "temporal",
            "down_blocks.1.motion_modules.0.transformer_blocks.0.attn2": "temporal",
        },
        frames=FRAMES,
        takes_n=False,
        notes=(
            "the denoiser gets one latent for each row and, frame fastest, text for each frame; "
            "spatial sites have row x frame rows, motion modules row x height x width"
        ),
    ),
    Case(
        "svd",
        build_svd,
        of_svd,
        # four spatio-temporal transformers with four attention modules each
        sites={"self": 4, "cross": 4, "temporal": 8},
        examples={
            f"{DOWN}.transformer_blocks.0.attn1": "self",
            f"{DOWN}.transformer_blocks.0.attn2": "cross",
            f"{DOWN}.temporal_transformer_blocks.0.attn1": "temporal",
            f"{DOWN}.temporal_transformer_blocks.0.attn2": "temporal",
        },
        guidance=2.5,
        frames=FRAMES,
        takes_n=False,
        notes=(
            "no text: a prompt names an image, whose embedding is the single key of each "
            "cross-attention, the temporal ones (attn2) included; all N rows are zeros; "
            "several images with n > 1 are mixed up by the pipeline itself"
        ),
    ),
)
