"""Terms by explicit matrices, in float64: what every other evaluator must agree with.

It forms every N x M matrix and is slow on purpose. It also serves the escape hatch, where an
editor asks for the probabilities themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hookctl.attention.assemble import scores_of, values_of, weight_of
from hookctl.attention.term import Term


def probabilities(term: Term, mask: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """The attention matrix of one term, [sub-batch, heads, N, M]; empty rows are 0."""
    parts = scores_of([term], mask)
    q, k = (x[0] if dtype is None else x[0].to(dtype) for x in (parts.q, parts.k))
    if term.value_only:
        eye = torch.eye(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device)
        return eye.expand(*q.shape[:2], *eye.shape)
    scores = q @ k.mT * parts.scale
    if parts.bias is not None:
        bias = parts.bias.to(scores.dtype)
        scores = scores + (bias[0] if bias.dim() == 5 else bias)
    if term.regions is not None:
        allowed = (term.regions.queries[:, None] & term.regions.keys[None]) != 0
        scores = scores.masked_fill(~allowed, float("-inf"))
    p = scores.softmax(-1)
    return p if parts.bias is None and term.regions is None else p.nan_to_num(0.0)


def evaluate(
    rows: list[tuple[Term, ...]],
    mask: Tensor | None,
    edits: list[list[Callable[[Tensor], Tensor]]] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """The sums of rows of terms, [rows, sub-batch, heads, N, channels], in the dtype of v.

    edits: per row, functions applied to the probabilities of every term.
    """
    out = []
    for i, terms in enumerate(rows):
        total: Tensor | None = None
        for term in terms:
            p = probabilities(term, mask, dtype)
            for edit in edits[i] if edits else ():
                p = edit(p)
            v = values_of([term])[0]
            part = p @ v.to(p.dtype)
            weight = weight_of([term], part)
            part = part * (weight[0] if isinstance(weight, Tensor) else weight)
            total = part if total is None else total + part
        assert total is not None  # a row has at least one term
        out.append(total.to(terms[0].own.v.base.dtype))
    return torch.stack(out)
