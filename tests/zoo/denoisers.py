"""Bare denoisers of further families: enough to see every attention call of theirs caught.

Their latents are 16 x 16, or as many tokens of 8 x 8; their texts have 7 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from .case import sharpen

ROWS, TEXT = 2, 7


@dataclass(frozen=True)
class DenoiserCase:
    """A tiny random denoiser.

    kind: its class in diffusers; options: of its constructor; inputs: makes the arguments of a
    call; sites: attention modules by kind; tokens: of text beside the image in a joint site.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    sites: Mapping[str, int]
    grid: tuple[int, int, int] = (1, 8, 8)
    tokens: int = TEXT

    def make(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = getattr(diffusers, self.kind)(**self.options)
            sharpen(model)
            for parameter in model.parameters():
                if not parameter.any():  # gates that begin shut would hide every edit
                    nn.init.normal_(parameter, std=0.3)
        return model.eval()

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            out: Tensor = model(**self.inputs(), return_dict=False)[0]
        return out


def _times() -> Tensor:
    return torch.full((ROWS,), 500.0)


def _packed(channels: int, text: int, **more: Any) -> dict[str, Any]:
    """A latent packed into 8 x 8 tokens."""
    return {
        "hidden_states": torch.randn(ROWS, 64, channels),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, text),
        **more,
    }


def _latent(*shape: int, text: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(ROWS, *shape),
        "encoder_hidden_states": torch.randn(ROWS, TEXT, text),
        **more,
    }


def _image_ids() -> Tensor:
    cells = torch.arange(64)
    return torch.stack([0 * cells, cells // 8, cells % 8], 1).float()


def _mask(kind: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(ROWS, TEXT, dtype=kind)


HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}

CASES = (
    DenoiserCase(
        "chroma", "ChromaTransformer2DModel",
        {**HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 2,
         "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 8,
         "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: _packed(16, 32, timestep=_times() / 1000, img_ids=_image_ids(),
                        txt_ids=torch.zeros(TEXT, 3)),
        {"joint": 3},
    ),
    DenoiserCase(
        "bria", "BriaTransformer2DModel",
        {**HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 2,
         "joint_attention_dim": 32, "axes_dims_rope": [4, 6, 6]},
        lambda: _packed(16, 32, timestep=_times(), img_ids=_image_ids(),
                        txt_ids=torch.zeros(TEXT, 3)),
        {"joint": 3},
    ),
    DenoiserCase(
        "ltx", "LTXVideoTransformer3DModel",
        {**HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": 16},
        lambda: {
            "hidden_states": torch.randn(ROWS, 2 * 64, 8),
            "encoder_hidden_states": torch.randn(ROWS, TEXT, 16),
            "timestep": _times(), "encoder_attention_mask": _mask(), "num_frames": 2, "height": 8,
            "width": 8,
        },
        {"self": 2, "cross": 2}, grid=(2, 8, 8),
    ),
    DenoiserCase(
        "cogvideox", "CogVideoXTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16,
         "num_layers": 2, "sample_width": 16, "sample_height": 16, "sample_frames": 9,
         "max_text_seq_length": TEXT},
        lambda: _latent(3, 4, 16, 16, timestep=_times().long()),
        {"joint": 2}, grid=(3, 8, 8),
    ),
    DenoiserCase(
        "cogview4", "CogView4Transformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16,
         "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
         "rope_axes_dim": (8, 8)},
        lambda: _latent(4, 16, 16, timestep=_times().long(),
                        original_size=torch.full((ROWS, 2), 16.0),
                        target_size=torch.full((ROWS, 2), 16.0),
                        crop_coords=torch.zeros(ROWS, 2)),
        {"joint": 2},
    ),
    DenoiserCase(
        "hunyuan_video", "HunyuanVideoTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
         "rope_axes_dim": (4, 6, 6)},
        lambda: _latent(4, 3, 16, 16, timestep=_times(), encoder_attention_mask=_mask(torch.int64),
                        pooled_projections=torch.randn(ROWS, 8),
                        guidance=torch.full((ROWS,), 1000.0)),
        {"joint": 2, "text": 1}, grid=(3, 8, 8),
    ),
    DenoiserCase(
        "hunyuan_dit", "HunyuanDiT2DModel",
        {**HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 16, "hidden_size": 32,
         "num_layers": 2, "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
         "pooled_projection_dim": 8, "text_len": TEXT, "text_len_t5": 5},
        lambda: _latent(4, 16, 16, timestep=_times(), text_embedding_mask=torch.ones(ROWS, TEXT),
                        encoder_hidden_states_t5=torch.randn(ROWS, 5, 16),
                        text_embedding_mask_t5=torch.ones(ROWS, 5),
                        image_meta_size=torch.ones(ROWS, 6), style=torch.zeros(ROWS).long(),
                        image_rotary_emb=(torch.ones(64, 16), torch.zeros(64, 16))),
        {"self": 2, "cross": 2},
    ),
    DenoiserCase(
        "sana", "SanaTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
         "caption_channels": 16, "sample_size": 16},
        lambda: _latent(4, 16, 16, timestep=_times(), encoder_attention_mask=_mask(torch.float32)),
        {"cross": 2}, grid=(1, 16, 16),
    ),
    DenoiserCase(
        "lumina2", "Lumina2Transformer2DModel",
        {"sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
         "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8,
         "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 64, 64), "cap_feat_dim": 16},
        lambda: _latent(4, 16, 16, timestep=_times() / 1000, encoder_attention_mask=_mask()),
        {"self": 1, "joint": 2, "text": 1},
    ),
    DenoiserCase(
        "auraflow", "AuraFlowTransformer2DModel",
        {**HEADS, "sample_size": 16, "in_channels": 4, "num_mmdit_layers": 1,
         "num_single_dit_layers": 2, "joint_attention_dim": 16, "caption_projection_dim": 32,
         "pos_embed_max_size": 64},
        lambda: _latent(4, 16, 16, timestep=_times() / 1000),
        {"joint": 3}, tokens=TEXT + 8,  # 8 learned tokens before the text
    ),
    DenoiserCase(
        "prx", "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 2,
         "axes_dim": [8, 8]},
        lambda: _latent(4, 16, 16, timestep=_times() / 1000, attention_mask=_mask()),
        {"joint": 2},
    ),
)  # fmt: skip
