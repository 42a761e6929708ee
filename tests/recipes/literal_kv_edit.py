"""KV-Edit as its official code writes it, for FLUX.1: the background is cut out of the sequence.

Zhu et al., arXiv 2502.17363. Nothing here is shared with the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from tests.recipes.literal_flow import TOKENS, Flux


class Info:
    """What the official code hands down to its blocks."""

    def __init__(self, inside: Tensor, scale: float, *, separate: bool = False) -> None:
        self.inside, self.scale, self.separate = inside, scale, separate  # inside: of the tokens
        self.feature: dict[Any, Tensor] = {}
        self.t, self.inverse = 0.0, True
        self.rotary: Any = None  # of all tokens


class Processor:
    """Attention of one block; text tokens stand before the image's."""

    def __init__(self, info: Info, block: str) -> None:
        self.info, self.block = info, block

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        info = self.info

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        x = hidden_states
        q = attn.norm_q(heads(attn.to_q(x)))
        k, v = attn.norm_k(heads(attn.to_k(x))), heads(attn.to_v(x))
        if encoder_hidden_states is not None:
            y = encoder_hidden_states
            q = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(y))), q], 1)
            k = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(y))), k], 1)
            v = torch.cat([heads(attn.add_v_proj(y)), v], 1)
        name = (info.t, self.block)
        mask: Tensor | None = None
        if info.inverse:
            info.rotary = image_rotary_emb
            info.feature[*name, "k"], info.feature[*name, "v"] = k[:, TOKENS:], v[:, TOKENS:]
            if info.separate:
                side = torch.cat([torch.full((TOKENS,), 3), 2 - info.inside.long()])
                mask = (side[:, None] & side[None]) > 0
        else:
            whole = info.feature[*name, "k"].clone(), info.feature[*name, "v"].clone()
            for kept, own in zip(whole, (k, v), strict=True):
                kept[:, info.inside] = own[:, TOKENS:]
            k, v = (
                torch.cat([own[:, :TOKENS], kept], 1)
                for own, kept in zip((k, v), whole, strict=True)
            )
            background = torch.cat([torch.zeros(TOKENS, dtype=torch.bool), ~info.inside])
            mask = torch.zeros(q.shape[1], k.shape[1], dtype=q.dtype)
            mask[:, background] = info.scale
        q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
        k = apply_rotary_emb(k, info.rotary, sequence_dim=1)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        text, image = out[:, :TOKENS], out[:, TOKENS:]
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


@contextmanager
def processed(pipe: Any, info: Info) -> Iterator[None]:
    before = dict(pipe.transformer.attn_processors)
    pipe.transformer.set_attn_processor({path: Processor(info, path) for path in before})
    try:
        yield
    finally:
        pipe.transformer.set_attn_processor(before)


class Cut(Flux):
    """Whose image tokens are some of the places alone, where they are fewer."""

    inside: Tensor

    def velocity(self, x: Tensor, time: Tensor, prompt: str, scale: float) -> Tensor:
        text, pooled, ids = self.pipe.encode_prompt(prompt, None, max_sequence_length=TOKENS)
        rows, columns = torch.meshgrid(
            torch.arange(self.height), torch.arange(self.width), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        if x.shape[1] < len(places):
            places = places[self.inside]
        found: Tensor = self.pipe.transformer(
            x,
            timestep=time.to(x.dtype).expand(1),
            guidance=torch.full([1], scale, dtype=torch.float32),
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=ids,
            img_ids=places.to(x.dtype),
        ).sample
        return found


def told(x: Tensor, t: float) -> Tensor:
    return (torch.tensor(t, dtype=torch.float32) * 1000).to(x.dtype) / 1000


@torch.no_grad()
def kv_edit(
    model: Cut,
    z0: Tensor,
    mask: Tensor,
    prompts: Sequence[str],
    *,
    skip: int,
    scales: tuple[float, float],
    bias: float,
    separate: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """mask: of the packed latents, [1, tokens, channels]; noise: starts anew from it."""
    inside = mask[0].any(-1)
    model.inside, info = inside, Info(inside, bias, separate=separate)
    times = model.sigmas[skip:]
    with processed(model.pipe, info):
        x = z0
        for now, after in zip(times[::-1][:-1], times[::-1][1:], strict=True):
            info.t = after
            info.feature[info.t, "img"] = x
            v = model.velocity(x, told(x, now), prompts[0], scales[0])
            x = x + (after - now) * v
        info.inverse = False
        zt = info.feature[times[0], "img"]
        if noise is not None:
            zt = (1 - times[0]) * z0 + times[0] * noise
        x, m = zt[:, inside], mask[:, inside]
        for now, after in zip(times[:-1], times[1:], strict=True):
            info.t = now
            x = info.feature[info.t, "img"][:, inside] * (1 - m) + x * m
            v = model.velocity(x, told(x, now), prompts[1], scales[1])
            x = x + (after - now) * v
    result = z0.clone()
    result[:, inside] = x
    return z0 * (1 - mask) + result * mask


@torch.no_grad()
def without_inversion(
    model: Cut,
    z0: Tensor,
    mask: Tensor,
    prompts: Sequence[str],
    *,
    skip: int,
    scales: tuple[float, float],
    bias: float,
    noise: Tensor,
) -> Tensor:
    inside = mask[0].any(-1)
    model.inside, info = inside, Info(inside, bias)
    times, z = model.sigmas[skip:], z0.clone()
    with processed(model.pipe, info):
        for now, after in zip(times[:-1], times[1:], strict=True):
            info.t, info.inverse = now, True
            source = (1 - now) * z0 + now * noise
            v_src = model.velocity(source, told(z, now), prompts[0], scales[0])
            info.inverse = False
            target = (z - z0 + source)[:, inside]
            v_tar = model.velocity(target, told(z, now), prompts[1], scales[1])
            move = (after - now) * (v_tar - v_src[:, inside])
            z[:, inside] = z[:, inside] + move * mask[:, inside]
    return z
