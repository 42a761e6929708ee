"""Bare modules: attention outside diffusers, in the forms that are met in the wild."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, HEADS, CONTEXT = 16, 2, 24


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Attention as the CompVis code writes it: the matrix of probabilities is there to see."""

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = HEADS):
        super().__init__()
        context_dim = context_dim or query_dim
        self.heads = heads
        self.scale = (query_dim // heads) ** -0.5
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        # Heads lie in the batch dimension: (rows * heads, tokens, channels).
        q, k, v = (split_heads(part, self.heads).flatten(0, 1) for part in parts)
        p = (torch.einsum("bid,bjd->bij", q, k) * self.scale).softmax(dim=-1)
        out = torch.einsum("bij,bjd->bid", p, v)
        return self.to_out(join_heads(out.unflatten(0, (-1, self.heads))))


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.attn2 = CrossAttention(dim, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, context_dim)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.proj_in(self.norm(x))
        size = h.shape[-2:]
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return self.proj_out(tokens.transpose(1, 2).unflatten(-1, size)) + x


class CompVisUNet(nn.Module):
    """A UNet with the names of the CompVis code: input, middle and output blocks."""

    def __init__(self, channels: int = WIDTH, context_dim: int = CONTEXT):
        super().__init__()
        self.time_embed = nn.Linear(1, channels)

        def stage(incoming: int, stride: int = 1) -> nn.ModuleList:
            conv = nn.Conv2d(incoming, channels, 3, stride=stride, padding=1)
            return nn.ModuleList([conv, SpatialTransformer(channels, context_dim)])

        self.input_blocks = nn.ModuleList([stage(4), stage(channels, stride=2)])
        self.middle_block = stage(channels)
        self.output_blocks = nn.ModuleList([stage(2 * channels), stage(2 * channels)])
        self.out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        time = self.time_embed(timesteps.float()[:, None] / 1000)[:, :, None, None]
        skips, h = [], x
        for conv, attention in self.input_blocks:
            h = attention(conv(h) + time, context)
            skips.append(h)
        conv, attention = self.middle_block
        h = attention(conv(h) + time, context)
        for conv, attention in self.output_blocks:
            skip = skips.pop()
            h = F.interpolate(h, size=skip.shape[-2:])
            h = attention(conv(torch.cat([h, skip], dim=1)) + time, context)
        return self.out(h)


class PlainAttention(nn.Module):
    """Self-attention through a fused projection; `early` calls the name bound at import."""

    def __init__(self, early: bool):
        super().__init__()
        self.early = early
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, HEADS) for part in self.qkv(x).chunk(3, dim=-1))
        if self.early:
            return self.proj(join_heads(scaled_dot_product_attention(q, k, v)))
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))


class MultiheadSelfAttention(nn.Module):
    """torch's own layer, which calls no attention function that can be seen from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class TokenModel(nn.Module):
    """Two residual layers over (rows, tokens, WIDTH), blocks.0.attn and blocks.1.attn."""

    def __init__(self, attention: Callable[[], nn.Module]):
        super().__init__()
        blocks = [{"norm": nn.LayerNorm(WIDTH), "attn": attention()} for _ in range(2)]
        self.blocks = nn.ModuleList(nn.ModuleDict(block) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x))
        return x


class ConvNet(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        return self.net(x)


@dataclass(frozen=True)
class ModuleCase:
    """A bare module, inputs for it by keyword, and the paths of its attention modules by kind."""

    name: str
    build: Callable[[], nn.Module]
    sites: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    notes: str = ""

    def make(self) -> nn.Module:
        """A new module, the same at each call; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval()

    def inputs(self, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs by keyword; `timesteps` are 500 in every row."""
        generator = torch.Generator().manual_seed(seed)
        inputs = {k: torch.randn(rows, *s, generator=generator) for k, s in self.shapes.items()}
        if "timesteps" in inputs:
            inputs["timesteps"] = torch.full((rows,), 500)
        return inputs


STAGES = ("input_blocks.0", "input_blocks.1", "middle_block", "output_blocks.0", "output_blocks.1")
COMPVIS_SITES = {
    f"{stage}.1.transformer_blocks.0.{name}": kind
    for stage in STAGES
    for name, kind in (("attn1", "self"), ("attn2", "cross"))
}
IMAGE_SIZE = {"x": (4, 8, 8), "timesteps": ()}
TOKENS = {"x": (12, WIDTH)}
PLAIN_SITES = {"blocks.0.attn": "self", "blocks.1.attn": "self"}

CASES = (
    ModuleCase(
        "compvis",
        CompVisUNet,
        COMPVIS_SITES,
        {**IMAGE_SIZE, "context": (7, CONTEXT)},
        notes="einsum, softmax, einsum: no call of SDPA",
    ),
    ModuleCase(
        "plain_sdpa", lambda: TokenModel(lambda: PlainAttention(False)), PLAIN_SITES, TOKENS
    ),
    ModuleCase(
        "plain_sdpa_early",
        lambda: TokenModel(lambda: PlainAttention(True)),
        PLAIN_SITES,
        TOKENS,
        notes="SDPA bound at import: replacing torch.nn.functional's name does nothing",
    ),
    ModuleCase("no_attention", ConvNet, {}, IMAGE_SIZE),
    ModuleCase(
        "mha",
        lambda: TokenModel(MultiheadSelfAttention),
        {"blocks.0.attn.attention": "self", "blocks.1.attn.attention": "self"},
        TOKENS,
        notes="a torch-function mode sees multi_head_attention_forward, never SDPA",
    ),
)
