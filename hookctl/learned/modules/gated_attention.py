"""Gated self-attention: image tokens read grounding tokens, in front of the cross-attention.

Li et al., "GLIGEN: Open-Set Grounded Text-to-Image Generation", arXiv 2301.07093 (CVPR 2023),
equation 8 and the official layer of that name; InstanceDiffusion (arXiv 2402.03290) has the same.
For image tokens x [rows, N, C] and grounding tokens o [rows, M, D]:

    u = LN([x ; W o])                              LN after the concatenation, so over N + M tokens
    x <- x + gamma tanh(alpha_attn) Attention(u)[:N]
    x <- x + gamma tanh(alpha_dense) FF(LN x)

The gates alpha begin at 0, where x stays what it is.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases on q, k, v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, u: Tensor, queries: int, mask: Tensor | None = None) -> Tensor:
        """Attention of the first `queries` tokens of u [rows, tokens, width] over all of them.

        mask: bool, what may be seen, broadcast to [rows, heads, queries, tokens].
        """
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(u[:, :queries]), self.to_k(u), self.to_v(u))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return cast(Tensor, self.to_out(out.transpose(1, 2).flatten(2)))


class GEGLU(nn.Module):
    """a * gelu(b), with a and b the halves of a projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class GatedSelfAttention(nn.Module):
    """The layer; width: C, token_width: D, heads: of the block it stands in (no shape tells)."""

    def __init__(self, width: int, token_width: int, heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(token_width, width)
        self.attn = SelfAttention(width, heads)
        self.ff = FeedForward(width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.alpha_attn = nn.Parameter(torch.tensor(0.0))
        self.alpha_dense = nn.Parameter(torch.tensor(0.0))

    @property
    def closed(self) -> bool:
        """Whether both gates are exactly 0, so that nothing passes."""
        return not (bool(self.alpha_attn) or bool(self.alpha_dense))

    def forward(
        self, x: Tensor, o: Tensor, gamma: float | Tensor = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        """x with what it reads from the grounding tokens.

        Receives: x [rows, N, C]; o [rows, M, D]; gamma, the strength, a number or one for each row
        [rows]; mask, bool, which tokens of [x ; o] an image token may see, broadcast to
        [rows, heads, N, N + M]. Returns: [rows, N, C]. Gates and strength are taken in float32 or
        finer whatever x is: tanh of a half would lose a small gate.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        if isinstance(gamma, Tensor):
            gamma = gamma.to(x.device, wide).reshape(-1, 1, 1)

        def added(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
            gate = gamma * torch.tanh(alpha.to(wide))
            return x + (gate * y.to(wide)).to(x.dtype)

        u = self.norm1(torch.cat([x, self.linear(o)], dim=1))
        x = added(x, self.attn(u, x.shape[1], mask), self.alpha_attn)
        return added(x, self.ff(self.norm2(x)), self.alpha_dense)
