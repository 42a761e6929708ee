"""Image and video pipelines with a transformer: SD3, Flux, PixArt, Wan."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from .case import Asked, Case, of_text, two_calls
from .text import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from .unets import PIXELS, autoencoder

T5_TOKENS = 16
CAUSAL_VAE = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
SHIFTED_VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06}


def build_sd3() -> StableDiffusion3Pipeline:
    """Three joint blocks; the first, as in SD3.5, attends to the image once more."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=64,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(**SHIFTED_VAE),
        text_encoder=clip_encoder(16, pooled=16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(32, pooled=24),
        tokenizer_2=clip_tokenizer(pad="!"),
        text_encoder_3=t5_encoder(64),
        tokenizer_3=t5_tokenizer(),
    )


def build_flux() -> FluxPipeline:
    """Two double and two single blocks, with a guidance embedding as in the dev model."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(**SHIFTED_VAE),
        text_encoder=clip_encoder(24),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(),
    )


def build_pixart() -> PixArtAlphaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
        vae=autoencoder(),
        text_encoder=t5_encoder(32),
        tokenizer=t5_tokenizer(),
    )


def build_wan() -> WanPipeline:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(**CAUSAL_VAE)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(32, multilingual=True),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer.eval(),
    )


def of_sd3(asked: Asked) -> dict[str, Any]:
    return {**of_text(asked), "max_sequence_length": T5_TOKENS}


def of_flux(asked: Asked) -> dict[str, Any]:
    """Guidance above 1 is true guidance, with a second call; the embedded one stays at 3.5."""
    return {
        **of_text(asked),
        "guidance_scale": 3.5,
        "true_cfg_scale": asked.guidance,
        "height": PIXELS,
        "width": PIXELS,
        "max_sequence_length": T5_TOKENS,
    }


def of_pixart(asked: Asked) -> dict[str, Any]:
    return {
        **of_text(asked),
        "clean_caption": False,
        "use_resolution_binning": False,
        "max_sequence_length": T5_TOKENS,
    }


def of_wan(asked: Asked) -> dict[str, Any]:
    sizes = {"height": 64, "width": 64, "num_frames": 9}
    return {**of_text(asked), **sizes, "max_sequence_length": T5_TOKENS}


CASES = (
    Case(
        "sd3",
        build_sd3,
        of_sd3,
        sites={"joint": 3, "self": 1},
        examples={"transformer_blocks.0.attn": "joint", "transformer_blocks.0.attn2": "self"},
        denoiser="transformer",
        notes="tokens: image 64, then CLIP 77, then T5 16; the last block drops the text's output",
    ),
    Case(
        "flux",
        build_flux,
        of_flux,
        sites={"joint": 4},
        examples={
            "transformer_blocks.1.attn": "joint",
            "single_transformer_blocks.0.attn": "joint",
        },
        rows=two_calls,
        denoiser="transformer",
        guidance=1.0,
        notes="tokens: T5 16, then image 64 (2 x 2 latents packed into one)",
    ),
    Case(
        "pixart",
        build_pixart,
        of_pixart,
        sites={"self": 2, "cross": 2},
        examples={"transformer_blocks.0.attn1": "self", "transformer_blocks.1.attn2": "cross"},
        denoiser="transformer",
        notes="the padding of the text is masked in the cross-attention",
    ),
    Case(
        "wan",
        build_wan,
        of_wan,
        sites={"self": 2, "cross": 2},
        examples={"blocks.0.attn1": "self", "blocks.1.attn2": "cross"},
        rows=two_calls,
        denoiser="transformer",
        frames=3,
        notes="self-attention runs over the tokens of all frames: 3 x 4 x 4",
    ),
)
