"""Flash attention over any number of terms per output row:

    out = sum_j  w_j(query) * softmax(Q_j K_j^T * scale + bias_j) V_j

Each term names the rows of the stacks that its q, k and v come from, so that rows which borrow
from each other are one launch and nothing is gathered. A softmax may run over several stretches
of keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.arguments import Extras
from hookctl.kernels.common.stretches import STACKS, Stretch
from hookctl.kernels.sum_of_terms.checks import check_extras, check_stacks
from hookctl.kernels.sum_of_terms.operators import forward_operator

__all__ = ["STACKS", "Stretch", "sum_of_terms"]


def sum_of_terms(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    terms: Sequence[Stretch],
    scale: float,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The sum of the terms of each output row.

    Receives
      q, k, v: up to three stacks each [rows, sub-batch, heads, tokens, channels], of any strides,
        one dtype and one head width; the queries of one length, the keys of any.
      terms: sorted by output row, from 0 on without a gap.
      weights: per query, [W, N]; bias: of the keys, [B, sub-batch | 1, heads | 1, M]; factors:
        rank-r biases, [F, N, r] and [F, M, r], added to the scaled scores.
    Returns
      out: [rows, sub-batch, heads, N, channels] in the dtype of q; a query without any allowed key
        gets 0. lse: natural log-sum-exp of the scores [terms, sub-batch, heads, N] in fp32, -inf
        for such a query; None unless asked for.

    Differentiable in q, k, v and weights, and through lse; biases are constants.
    Raises ValueError for what does not fit together, and where no kernel can run or none ships for
    the dtype and the width.
    """
    q, k, v, terms = list(q), list(k), list(v), list(terms)
    check_stacks(q, k, v, terms)
    check_extras(q, k, terms, weights, bias, factors)
    extras = Extras.of(q[0], weights, bias, factors)
    given = [*q, *k, *v, *([] if weights is None else [weights])]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    integers, numbers = stretches.encode(terms)
    rows = terms[-1].row + 1
    out, found = forward_operator(q, k, v, *extras, integers, numbers, rows, scale, lse or learns)
    return out, found if lse else None
