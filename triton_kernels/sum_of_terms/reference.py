"""The sum of terms by explicit matrices, in the dtype of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.stretches import Stretch


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
) -> tuple[Tensor, Tensor]:
    out: dict[int, Tensor] = {}
    found = []
    for term in stretches.terms(terms):
        scores = torch.cat([_scores(q, k, s, scale, bias, factors) for s in term], -1)
        values = torch.cat([stretches.row_of(v, s.v) for s in term], -2)
        empty = (scores == float("-inf")).all(-1)
        scores = scores.masked_fill(empty[..., None], 0.0)
        p = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
        found.append(scores.logsumexp(-1).masked_fill(empty, float("-inf")))
        last = term[-1]
        part = p @ values * last.weight
        if last.weights >= 0 and weights is not None:
            part = part * weights[last.weights, :, None]
        out[last.row] = out[last.row] + part if last.row in out else part
    return torch.stack([out[row] for row in sorted(out)]), torch.stack(found)


def _scores(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    s: Stretch,
    scale: float,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
) -> Tensor:
    scores = stretches.row_of(q, s.q) @ stretches.row_of(k, s.k).mT * scale + s.shift
    keys = scores.shape[-1]
    if bias is not None and s.bias >= 0:
        scores = scores + bias[s.bias, ..., None, :keys]
    if factors is not None and s.factors >= 0:
        scores = scores + (factors[0][s.factors] @ factors[1][s.factors].mT)[:, :keys]
    return scores
