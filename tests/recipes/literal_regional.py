"""Regional prompting of joint models as its official code has it, told with dense masks.

Chen et al., arXiv 2411.02395: the sequence is [texts of the regions, image], with a mask of
[tokens, tokens]; a second stream with the base prompt runs beside, and the image's outputs are
mixed, b base + (1 - b) regional. Here both streams' texts stand in one sequence [base, text_1, ...,
text_R, image], and every attention of it is told by its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def allowed(masks: Sequence[Tensor], texts: Sequence[int], image: int) -> Tensor:
    """Which pairs of [text_1, ..., text_R, image] may see each other, bool; masks: the image tokens
    of each region; texts: tokens of each."""
    n = sum(texts) + image
    seen = torch.zeros(n, n, dtype=torch.bool)
    drawn = slice(sum(texts), n)
    start = 0
    among = torch.zeros(image, image, dtype=torch.bool)
    for mask, tokens in zip(masks, texts, strict=True):
        own = slice(start, start + tokens)
        seen[own, own] = True
        seen[own, drawn] = mask[None]
        seen[drawn, own] = mask[:, None]
        among |= mask[:, None] & mask[None]
        start += tokens
    nowhere = ~torch.stack(list(masks)).any(0)
    seen[drawn, drawn] = among | (nowhere[:, None] & nowhere[None])
    return seen


def attention(base: int, masks: Sequence[Tensor], texts: Sequence[int], b: float) -> Any:
    """Of q, k, v [rows, heads, tokens, channels] over [base, text_1, ..., text_R, image]."""
    seen = allowed(masks, texts, len(masks[0]))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v

    def told(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        further = sum(texts)
        regional = attend(*(x[:, :, base:] for x in (q, k, v)), seen)
        plain = [torch.cat([x[:, :, :base], x[:, :, base + further :]], 2) for x in (q, k, v)]
        own = attend(*plain)
        image = b * own[:, :, base:] + (1 - b) * regional[:, :, further:]
        return torch.cat([own[:, :, :base], regional[:, :, :further], image], 2)

    return told


class Told:
    """Attention of a denoiser in another way, as long as its calls last."""

    def __init__(self, denoiser: nn.Module, told: Callable[..., Tensor]) -> None:
        self.denoiser, self.told = denoiser, told

    def __enter__(self) -> Told:
        sdpa = F.scaled_dot_product_attention

        def swap(function: Any) -> Any:
            return lambda *_: setattr(F, "scaled_dot_product_attention", function)

        def by_name(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
            return self.told(query, key, value)

        self._handles = [
            self.denoiser.register_forward_pre_hook(swap(by_name)),
            self.denoiser.register_forward_hook(swap(sdpa), always_call=True),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
