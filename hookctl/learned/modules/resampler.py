"""Perceiver resampler: any number of visual tokens become a fixed number of learned ones.

Alayrac et al., "Flamingo", arXiv 2204.14198. Learned latents l ask the visual tokens x and each
other, layer by layer:

    l = l + W_o Attn(W_q LN2(l), W_kv [LN1(x); LN2(l)]),    l = l + FF(l)

`Resampler` is the form of IP-Adapter-Plus (Ye et al., arXiv 2308.06721) and InstantID (Wang et al.,
arXiv 2401.07519), `PerceiverResampler` with `GatedCrossAttention` that of Flamingo itself, which
adds a learned embedding of time and a gate tanh(alpha), closed at first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64  # channels of a head in every published file


class PerceiverAttention(nn.Module):
    """Latents ask visual tokens and themselves; no biases in the projections."""

    def __init__(self, width: int, heads: int, head_width: int = HEAD) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """[rows, tokens, width] and [rows, latents, width] -> [rows, latents, width]"""
        latents = self.norm2(latents)
        both = torch.cat([self.norm1(x), latents], 1)
        k, v = self.to_kv(both).chunk(2, -1)
        return self.to_out(attention(self.to_q(latents), k, v, self.heads))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(channels of a head)) v of tensors [rows, tokens, heads * channels]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def feed_forward(width: int, factor: int = 4) -> nn.Sequential:
    """LN, two layers without biases, GELU between them."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, factor * width, bias=False),
        nn.GELU(),
        nn.Linear(factor * width, width, bias=False),
    )


def perceiver_layers(
    width: int, depth: int, heads: int, head_width: int = HEAD, factor: int = 4
) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleList([PerceiverAttention(width, heads, head_width), feed_forward(width, factor)])
        for _ in range(depth)
    )


def through(layers: nn.ModuleList, x: Tensor, latents: Tensor) -> Tensor:
    """The latents after all layers."""
    for layer in layers:
        ask, forward = layer.children()
        latents = latents + ask(x, latents)
        latents = latents + forward(latents)
    return latents


class Resampler(nn.Module):
    """Image features or a face's embedding as tokens that a UNet reads beside the text.

    width: of the latents; output: channels of the UNet's text; features: channels of what is read;
    tokens: how many latents. Published: IP-Adapter-Plus (768, 768, 1280, heads=12), for SDXL
    (1280, 2048, 1280, heads=20), InstantID (1280, 2048, 512, heads=20), which reads a face.
    """

    reads: tuple[str, ...] = ("features",)

    def __init__(
        self,
        width: int,
        output: int,
        features: int,
        *,
        heads: int,
        depth: int = 4,
        tokens: int = 16,
        head_width: int = HEAD,
    ) -> None:
        super().__init__()
        self.widths = (features,)
        self.latents = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.proj_in = nn.Linear(features, width)
        self.proj_out = nn.Linear(width, output)
        self.norm_out = nn.LayerNorm(output)
        self.layers = perceiver_layers(width, depth, heads, head_width)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, any number, features] -> [rows, tokens, output]"""
        latents = self.latents.expand(len(x), -1, -1)
        latents = through(self.layers, self.proj_in(x), latents)
        return self.norm_out(self.proj_out(latents))


class PerceiverResampler(nn.Module):
    """Flamingo's resampler: frames of visual tokens, each frame with a learned embedding of its
    time, become `tokens` tokens, which `GatedCrossAttention` shows to another model.

    width: of the visual tokens and the latents; frames: the most that may come.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        depth: int = 6,
        tokens: int = 64,
        frames: int = 8,
        head_width: int = HEAD,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.time_embeddings = nn.Parameter(torch.randn(frames, 1, width) * width**-0.5)
        self.layers = perceiver_layers(width, depth, heads, head_width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, frames, tokens of a frame, width] -> [rows, tokens, width]"""
        x = (x + self.time_embeddings[: x.shape[1]]).flatten(1, 2)
        latents = self.latents.expand(len(x), -1, -1)
        return self.norm(through(self.layers, x, latents))


class GatedCrossAttention(nn.Module):
    """Tokens of a frozen model ask visual ones, through gates that are closed at first:

        y = y + tanh(alpha_attn) W_o Attn(W_q LN(y), W_kv x),    y = y + tanh(alpha_ff) FF(y)

    width: of y; visual: of x. With both alphas 0, as they start, y stays as it is.
    """

    def __init__(self, width: int, visual: int, *, heads: int = 8, head_width: int = HEAD) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(visual, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff = feed_forward(width)
        self.alpha_attn = nn.Parameter(torch.tensor(0.0))
        self.alpha_ff = nn.Parameter(torch.tensor(0.0))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """[rows, tokens, width] and [rows, visual tokens, visual] -> [rows, tokens, width]"""
        k, v = self.to_kv(x).chunk(2, -1)
        found = self.to_out(attention(self.to_q(self.norm(y)), k, v, self.heads))
        y = y + _gate(self.alpha_attn, y) * found
        return y + _gate(self.alpha_ff, y) * self.ff(y)


def _gate(alpha: Tensor, like: Tensor) -> Tensor:
    """tanh(alpha), in float32 at least: half precision would lose a gate that has just opened."""
    wide = alpha if alpha.dtype == torch.float64 else alpha.float()
    return wide.tanh().to(like)
