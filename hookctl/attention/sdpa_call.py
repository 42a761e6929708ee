"""The arguments of one `scaled_dot_product_attention`, in one place."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class SDPACall(NamedTuple):
    """What a model gave to `torch.nn.functional.scaled_dot_product_attention`, by its names.

    query, key, value: [batch, heads, tokens, channels]; attn_mask: broadcasts to
    [batch, heads, queries, keys], additive or bool (True: may be seen); scale: None for
    1 / sqrt(channels); enable_gqa: fewer heads of keys than of queries.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def attend(self) -> Tensor:
        """The model's own attention, [batch, heads, queries, channels of value]."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def ungrouped(self) -> SDPACall:
        """With as many heads of keys and values as of queries (grouped-query attention)."""
        heads, kept = self.query.shape[-3], self.key.shape[-3]
        if not self.enable_gqa or heads == kept:
            return self
        key, value = (x.repeat_interleave(heads // kept, -3) for x in (self.key, self.value))
        return self._replace(key=key, value=value)
