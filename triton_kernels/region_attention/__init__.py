"""Flash attention between tokens that share a region:

    out_n = sum_m softmax_m(q_n k_m * scale) v_m     over the keys with query_regions & key_regions

Every token has an int64 bit set, and no mask is formed. The gradients are recomputed tile by tile
(Dao, arXiv 2307.08691), without atomics: runs are bit-identical.
"""

from __future__ import annotations

from torch import Tensor

from hookctl.kernels.common.launch import check_launch
from hookctl.kernels.region_attention import forward
from hookctl.kernels.region_attention.tile_lists import tile_lists

__all__ = ["lists", "region_attention"]


def lists(query_regions: Tensor, key_regions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of tiles for queries `like` these, made once and given to many calls."""
    tile = forward.tile_of(like)
    return tile_lists(
        query_regions.reshape(-1, query_regions.shape[-1]),
        key_regions.reshape(-1, key_regions.shape[-1]),
        tile.block_m,
        tile.block_n,
    )


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_regions: Tensor,
    key_regions: Tensor,
    scale: float | None = None,
    listed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the scores, both differentiable in q, k and v.

    q: [batch, heads, N, channels]; k, v: [batch, heads, M, channels], up to 160 channels, any
    strides; query_regions, key_regions: int64 [N] and [M] on the same device, or a row of both for
    each of the batch; scale: channels ** -0.5 by default; listed: `lists` of the same regions.
    Returns [batch, heads, N, channels] and float32 [batch, heads, N]. A query that shares a region
    with no key gets 0, and -inf.
    Raises ValueError where no kernel can run or none ships for the dtype and the width.
    """
    check_launch("region_attention", q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    order, counts = listed or lists(query_regions, key_regions, q)
    of_queries, of_keys = (
        r.contiguous().expand(q.shape[0], -1) for r in (query_regions, key_regions)
    )
    return forward.operator(q, k, v, of_queries, of_keys, order, counts, scale)
