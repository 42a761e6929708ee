"""Attention maps of chosen keys, averaged over heads, from q and k alone:

    map[n, t] = mean_h softmax_m(q_hn k_hm * scale)     at m = tokens[t]

The matrix is never formed: the log-sum-exp of a query is found tile by tile, or given, and then
only the chosen columns are. The gradient recomputes the probabilities, so an energy over a map
costs no matrix either. `key_marginals` sums the matrix over its other side: the attention that each
key draws from all queries (Hong et al., arXiv 2210.00939).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookctl.kernels.common.launch import check_launch
from hookctl.kernels.map_readout import forward

__all__ = ["key_marginals", "map_readout"]


def map_readout(
    q: Tensor, k: Tensor, tokens: Tensor, scale: float | None = None, lse: Tensor | None = None
) -> Tensor:
    """Probabilities of chosen keys, averaged over heads: float32 [batch, N, T], differentiable.

    q: [batch, heads, N, channels]; k: [batch, heads, M, channels], up to 160 channels, any strides;
    tokens: int64 [T], or a row for each of the batch, where -1 stands for no key and gives 0;
    scale: channels ** -0.5 by default; lse: log-sum-exp of the scores, float32 [batch, heads, N],
    if an attention over the same q and k has given it.
    Raises ValueError where no kernel can run or none ships for the dtype and the width.
    """
    check_launch("map_readout", q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = torch.where(tokens < 0, k.shape[2], tokens).expand(q.shape[0], -1)
    parts = []
    for some in chosen.split(forward.MOST_TOKENS, 1):
        part, lse = forward.operator(q, k, some, lse, scale)
        parts.append(part)
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def key_marginals(
    q: Tensor, k: Tensor, scale: float | None = None, lse: Tensor | None = None
) -> Tensor:
    """The attention that each key draws, summed over queries and averaged over heads.

    Arguments and errors as of `map_readout`. Returns float32 [batch, M], without a gradient.
    """
    check_launch("key_marginals", q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad():
        if lse is None:
            nothing = torch.full((1, 1), k.shape[2], device=q.device).expand(q.shape[0], 1)
            lse = forward.operator(q, k, nothing, None, scale)[1]
        return forward.marginals_operator(q, k, lse.contiguous(), scale).mean(1)
