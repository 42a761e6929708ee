"""The velocity network: a small SD3 transformer over 16 x 16 latents, and its noise schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..latents import CELL, CHANNELS
from ..text import WIDTH

HEAD = 64  # channels of an attention head
SHIFT = 3.0  # of the levels of noise when sampling (SD3, section 5.3.2)


@dataclass(frozen=True)
class Size:
    """Of the transformer: blocks, and heads of 64 channels."""

    layers: int = 6
    heads: int = 3


def build_network(size: Size = Size()) -> SD3Transformer2DModel:
    """A fresh network, [batch, 12, 16, 16]; texts are [batch, tokens, 256], pooled [batch, 256].

    Its first prediction is zero: diffusers begins modulations at random, adaLN-Zero (DiT, Peebles
    and Xie 2022, section 3.2) does not.
    """
    width = size.heads * HEAD
    network = SD3Transformer2DModel(
        sample_size=CELL, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=size.layers, num_attention_heads=size.heads, attention_head_dim=HEAD,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH,
        caption_projection_dim=width, pos_embed_max_size=CELL // 2, qk_norm="rms_norm",
    )  # fmt: skip
    for name, p in network.named_parameters():
        if name.endswith("bias") or ".norm1" in name or name.startswith(("norm_out", "proj_out")):
            nn.init.zeros_(p)
        elif p.ndim > 1:
            nn.init.xavier_uniform_(p.flatten(1))
    return network


def by_adam(network: SD3Transformer2DModel) -> tuple[str, ...]:
    """The matrices that Muon is not for: modulations, and the first and last layers."""
    ends = ("pos_embed", "context_embedder", "norm_out", "proj_out")
    names = [name for name, _ in network.named_parameters()]
    return tuple(name for name in names if ".norm1" in name or name.startswith(ends))


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps over shifted levels of noise."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


class CountedZeros:
    """Joint attention in which the last text token stands for many equal ones.

    Without a T5 the pipeline appends up to 256 zero tokens. They have no positions, so they stay
    equal through all layers, and k of them are one whose logit is raised by log k: `log_counts`
    [batch], -inf where there are none. Matrix products and a softmax, which on the CPU are quicker
    than the fused kernel for so few tokens. None: no token is special.
    """

    def __init__(self, log_counts: Tensor | None = None) -> None:
        self.log_counts = log_counts

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [batch, cells, width] and text tokens [batch, tokens, width], attended."""
        batch, cells, _ = hidden_states.shape

        def split(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, HEAD).transpose(1, 2)

        def joined(image: Tensor, text: Tensor) -> Tensor:
            return torch.cat([image, text], 2).flatten(0, 1)

        x, c = hidden_states, encoder_hidden_states
        q = joined(
            normed(split(attn.to_q(x)), attn.norm_q),
            normed(split(attn.add_q_proj(c)), attn.norm_added_q),
        )
        k = joined(
            normed(split(attn.to_k(x)), attn.norm_k),
            normed(split(attn.add_k_proj(c)), attn.norm_added_k),
        )
        v = joined(split(attn.to_v(x)), split(attn.add_v_proj(c)))
        bias = q.new_zeros(batch, 1, 1, q.shape[1])
        if self.log_counts is not None:
            bias[..., -1] = self.log_counts.to(q.dtype)[:, None, None]
        bias = bias.expand(-1, attn.heads, -1, -1).flatten(0, 1)
        weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=HEAD**-0.5).softmax(-1)
        out = (weights @ v).unflatten(0, (batch, attn.heads)).transpose(1, 2).flatten(2)
        image, text = out[:, :cells], out[:, cells:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """RMSNorm over the last dimension by one norm in float32, in half the time of diffusers'."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (length.square() / x.shape[-1] + norm.eps).rsqrt().to(x.dtype)
    return x * scale * norm.weight
