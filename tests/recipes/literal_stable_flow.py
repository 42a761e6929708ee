"""Stable Flow as its official code writes it, for FLUX.1, with the layers that are vital given.

Avrahami et al., arXiv 2411.14430. Nothing here is shared with the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.recipes.literal_flow import TOKENS, Flux


@contextmanager
def shared(pipe: Any, double: Sequence[int], single: Sequence[int]) -> Iterator[None]:
    """The image's keys and values of rows 1 ... are row 0's, before norm and rotation."""

    def take(text: int) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            if len(out) == 1:
                return out
            image = out[:1, text:].expand(len(out) - 1, -1, -1)
            return torch.cat([out[:1], torch.cat([out[1:, :text], image], 1)])

        return hook

    model, hooks = pipe.transformer, []
    chosen = [(model.transformer_blocks[i].attn, 0) for i in double]
    chosen += [(model.single_transformer_blocks[i].attn, TOKENS) for i in single]
    for attention, text in chosen:
        hooks += [one.register_forward_hook(take(text)) for one in (attention.to_k, attention.to_v)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def velocity(
    model: Flux, x: Tensor, time: Tensor, prompts: Sequence[str], scales: Sequence[float]
) -> Tensor:
    """time: from 0 (clean) to 1."""
    text, pooled, ids = model.pipe.encode_prompt(list(prompts), None, max_sequence_length=TOKENS)
    side = int(x.shape[1] ** 0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    found: Tensor = model.pipe.transformer(
        x,
        timestep=time.to(x.dtype).expand(len(x)),
        guidance=torch.tensor(scales, dtype=torch.float32),
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=ids,
        img_ids=places.to(x.dtype),
    ).sample
    return found


@torch.no_grad()
def stable_flow(
    model: Flux,
    x: Tensor,
    prompts: Sequence[str],
    scales: Sequence[float],
    double: Sequence[int],
    single: Sequence[int],
    inverted: Sequence[Tensor] | None = None,
) -> Tensor:
    """x: [prompts, ...]; inverted: what the inversion reached, step by step."""
    with shared(model.pipe, double, single):
        for i, t in enumerate(model.timesteps):
            v = velocity(model, x, t.to(x.dtype) / 1000, prompts, scales)
            x = x + (model.sigmas[i + 1] - model.sigmas[i]) * v
            if inverted is not None:
                x[0] = inverted[-i][0]
    return x


@torch.no_grad()
def inversion(model: Flux, x: Tensor, prompt: str, nudge: float) -> list[Tensor]:
    """The latents after each step upwards; the model is asked at the level sought."""
    x, reached = nudge * x, []
    for i in reversed(range(len(model.timesteps))):
        v = velocity(model, x, model.timesteps[i].to(x.dtype) / 1000, [prompt], [1.0])
        x = x + (model.sigmas[i] - model.sigmas[i + 1]) * v
        reached.append(x)
    return reached
