"""What users write by hand or take from the community: attention processors to measure beside."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl import recipes
from hookctl.recipes.common.canvas.region_shares import region_shares


class Controller:
    """P2P as community pipelines have it: probabilities of all heads, those of the edit replaced.

    most: tokens of the self-attention that is replaced.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        text = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
        )
        p = attn.get_attention_scores(q, k, None)
        is_cross = encoder_hidden_states is not None
        if is_cross or p.shape[1] <= self.most:
            half = len(p) // 2
            own = p[half:].unflatten(0, (-1, attn.heads))
            if is_cross:
                mapper = torch.eye(p.shape[-1]).to(p)[None]
                own[1:] = torch.einsum("hpw,bwn->bhpn", own[0], mapper)
            else:
                own[1:] = own[0]
        out = attn.batch_to_head_dim(torch.bmm(p, v))
        return attn.to_out[0](out)


class HandBatched:
    """Regional prompts as one writes them by hand: every text projected once, one SDPA of the
    image's queries over all of them, the outputs mixed by their masks."""

    def __init__(self, pipe: Any, texts: list[str], edit: recipes.RegionalPrompts) -> None:
        self.pipe, self.names, self.edit = pipe, texts, edit
        self.masks: dict[int, Tensor] = {}
        self.encode()

    def encode(self) -> None:
        device = self.pipe._execution_device
        self.texts = self.pipe.encode_prompt(self.names, device, 1, False)[0]

    def __call__(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        q, k, v, more_k, more_v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.to_q(hidden),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
                attn.to_k(self.texts),
                attn.to_v(self.texts),
            )
        )
        out = F.scaled_dot_product_attention(q, k, v)
        many = F.scaled_dot_product_attention(
            q[1:].expand(len(self.names), -1, -1, -1), more_k, more_v
        )
        mask = self._mask(q)
        mixed = out[1] * (1 - mask.sum(0)) + (many * mask).sum(0)
        out = torch.stack([out[0], mixed])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def _mask(self, q: Tensor) -> Tensor:
        """[regions, 1, N, 1]"""
        tokens = q.shape[2]
        if tokens not in self.masks:
            side = round(tokens**0.5)
            shares = region_shares(self.edit.regions[0], side, side).flatten(1)
            self.masks[tokens] = (1 - self.edit.base) * shares.to(q)[:, None, :, None]
        return self.masks[tokens]
