"""Region attention by an explicit matrix, in the dtype of its arguments."""

from __future__ import annotations

from torch import Tensor


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_regions: Tensor,
    key_regions: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    allowed = (query_regions[..., :, None] & key_regions[..., None, :]) != 0
    allowed = allowed[:, None] if allowed.dim() == 3 else allowed
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    empty = ~allowed.any(-1, keepdim=True)
    # Rows without a key are let see all of them and cut afterwards: their gradient is 0, not NaN.
    scores = scores.masked_fill(~(allowed | empty), float("-inf"))
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return (scores.softmax(-1) @ v).masked_fill(empty, 0.0), lse
