"""Terms over short keys with their probabilities formed once and used by every row.

Over 77 text tokens the matrix is thin (N x 77), and the source's probabilities serve the source's
edits at once: one softmax, several value tensors. Values that a token map gives no weight are not
multiplied. On a CPU this beats one SDPA call per term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.attention.assemble import factors_bias, key_bias, values_of
from hookctl.attention.sdpa import Piece
from hookctl.attention.term import Sum, Term


def evaluate(finished: Sum, rows: Sequence[int]) -> list[Piece]:
    """The sums of some rows, in pieces [1, sub-batch, heads, N, channels].

    Each distinct softmax is formed once, [sub-batch * heads, N, M] for M keys: use it where M is
    short.
    """
    users: dict[Any, list[tuple[int, Term]]] = {}
    for row in rows:
        for term in finished.terms[row]:
            users.setdefault(_key(term), []).append((row, term))
    totals: dict[int, Tensor] = {}
    for uses in users.values():
        p = probabilities(uses[0][1], finished.mask)
        for row, term in uses:
            totals[row] = _added(totals.get(row), p, term)
    shape = finished.terms[rows[0]][0].q.base.shape[1:3]
    return [([row], totals[row].unflatten(0, (1, *shape))) for row in rows]


def _key(term: Term) -> tuple[Any, ...]:
    """Terms of equal key have equal probabilities."""
    return (
        id(term.q.base),
        term.q.row,
        term.factors and tuple(id(pair) for pair in term.factors),
        *((id(s.k.base), s.k.row, s.mask_row, id(s.shift)) for s in term.segments),
    )


def probabilities(term: Term, mask: Tensor | None) -> Tensor:
    """[sub-batch * heads, N, M]; rows without any allowed key are 0."""
    q = term.q.tensor.flatten(0, 1)
    keys = [s.k.tensor for s in term.segments]
    k = (keys[0] if len(keys) == 1 else torch.cat(keys, -2)).flatten(0, 1)
    # beta=0: the first argument is never read, only its shape.
    unread = q.new_empty(1, 1, 1).expand(q.shape[0], q.shape[1], k.shape[1])
    scores = torch.baddbmm(unread, q, k.mT, beta=0, alpha=term.scale)
    if term.factors:
        scores = scores + factors_bias(term)
    bias = key_bias([term], mask)
    if bias is None:
        return scores.softmax(-1)
    empty = (bias == float("-inf")).all(-1, keepdim=True)
    shape = term.q.base.shape[1:3]
    scores = scores.unflatten(0, shape) + bias[0].to(q.dtype).masked_fill(empty[0], 0.0)
    return scores.softmax(-1).masked_fill(empty[0], 0.0).flatten(0, 1)


def _added(total: Tensor | None, p: Tensor, term: Term) -> Tensor:
    """total + weight * P V, [sub-batch * heads, N, channels]."""
    only = term.maps[0] if len(term.maps) == 1 and len(term.segments) == 1 else None
    if only is not None and only.covers(term.own.tokens):
        if only.used is not None:
            p = p[..., only.used[0] : only.used[1]]
        v = only.apply_used(term.own.v.tensor)
    else:
        v = values_of([term])[0]
    v = v.flatten(0, 1)
    if isinstance(term.weight, Tensor):
        part = torch.bmm(p, v) * term.weight[:, None]
        return part if total is None else total + part
    if total is None:
        part = torch.bmm(p, v)
        return part if term.weight == 1.0 else part * term.weight
    return total.baddbmm_(p, v, alpha=term.weight)
