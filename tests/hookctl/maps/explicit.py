"""Attention maps by the softmax itself."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Explicit:
    """Every softmax over so many keys in a denoiser, [batch, N, M] of each, heads averaged."""

    def __init__(self, denoiser: nn.Module, keys: int) -> None:
        self.denoiser, self.keys = denoiser, keys
        self.seen: list[Tensor] = []

    def __enter__(self) -> Explicit:
        sdpa = F.scaled_dot_product_attention

        def attend(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
            if key.shape[-2] == self.keys:
                scores = query @ key.mT * query.shape[-1] ** -0.5
                mask = rest.get("attn_mask")
                self.seen.append((scores if mask is None else scores + mask).softmax(-1).mean(1))
            return sdpa(query, key, value, **rest)

        def swap(function: Any) -> Any:
            return lambda *_: setattr(F, "scaled_dot_product_attention", function)

        self._handles = [
            self.denoiser.register_forward_pre_hook(swap(attend)),
            self.denoiser.register_forward_hook(swap(sdpa), always_call=True),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
