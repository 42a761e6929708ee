"""Terms over short keys with their probabilities formed once and used by every row.

Over 77 text tokens the matrix is thin (N x 77), and the source's probabilities serve the source's
edits at once: one softmax, several value tensors. Values that a token map gives no weight are not
multiplied. On a CPU this beats one SDPA call per term; rows are taken one at a time, so that q, k
and v are read where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.attention.assemble import factors_bias, key_bias, values_of
from hookctl.attention.sdpa import Piece
from hookctl.attention.term import Ref, Sum, Term


def evaluate(finished: Sum, rows: Sequence[int]) -> list[Piece]:
    """The sums of some rows, in one piece [rows, sub-batch, heads, N, channels].

    Each distinct softmax is formed once, [sub-batch * heads, N, M] for M keys: use it where M is
    short.
    """
    users: dict[Any, list[tuple[int, Term]]] = {}
    for row in rows:
        for term in finished.terms[row]:
            users.setdefault(_key(term), []).append((row, term))
    totals: dict[int, Tensor] = {}
    flat = _Flat()
    for uses in users.values():
        p = _probabilities(uses[0][1], finished.mask, flat)
        for row, term in uses:
            totals[row] = _added(totals.get(row), p, term, flat)
    _, sub, heads, *_ = uses[0][1].q.base.shape
    # Tokens before heads: merging the heads afterwards copies nothing.
    stacked = torch.stack([totals[row].transpose(0, 1) for row in rows])
    return [(list(rows), stacked.unflatten(2, (sub, heads)).permute(0, 2, 3, 1, 4))]


def _key(term: Term) -> tuple[Any, ...]:
    """Terms of equal key have equal probabilities."""
    return (
        id(term.q.base),
        term.q.row,
        term.factors and tuple(id(pair) for pair in term.factors),
        *((id(s.k.base), s.k.row, s.mask_row, id(s.shift)) for s in term.segments),
    )


def _probabilities(term: Term, mask: Tensor | None, flat: _Flat) -> Tensor:
    """[sub-batch * heads, N, M]; rows without any allowed key are 0."""
    q = flat.row(term.q)
    keys = [flat.row(s.k) for s in term.segments]
    k = keys[0] if len(keys) == 1 else torch.cat(keys, -2)
    scores = torch.baddbmm(_unread(q), q, k.mT, beta=0, alpha=term.scale)
    if term.factors:
        scores = scores + factors_bias(term)
    bias = key_bias([term], mask)
    if bias is None:
        return scores.softmax(-1)
    empty = (bias == float("-inf")).all(-1, keepdim=True)
    shape = term.q.base.shape[1:3]
    scores = scores.unflatten(0, shape) + bias[0].to(q.dtype).masked_fill(empty[0], 0.0)
    return scores.softmax(-1).masked_fill(empty[0], 0.0).flatten(0, 1)


_zero: dict[torch.dtype, Tensor] = {}


def _unread(like: Tensor) -> Tensor:
    """The first argument of baddbmm, which it never reads if beta is 0."""
    if like.device.type != "cpu":
        return like.new_zeros(())
    if like.dtype not in _zero:
        _zero[like.dtype] = torch.zeros((), dtype=like.dtype)
    return _zero[like.dtype]


class _Flat:
    """The rows of stacks as [sub-batch * heads, tokens, channels]."""

    def __init__(self) -> None:
        self._rows: dict[int, Sequence[Tensor]] = {}

    def row(self, ref: Ref) -> Tensor:
        base = ref.base
        if base.shape[1] != 1:
            return base[ref.row].flatten(0, 1)  # a copy, which lives no longer than it must
        if id(base) not in self._rows:
            self._rows[id(base)] = base.squeeze(1).unbind(0)
        return self._rows[id(base)][ref.row]


def _added(total: Tensor | None, p: Tensor, term: Term, flat: _Flat) -> Tensor:
    """total + weight * P V, [sub-batch * heads, N, channels]."""
    maps, single = term.maps, len(term.segments) == 1
    if not maps and single:
        v = flat.row(term.own.v)
    elif len(maps) == 1 and single and maps[0].covers(term.own.tokens):
        if maps[0].used is not None and maps[0].used != (0, term.own.tokens):
            p = p[..., maps[0].used[0] : maps[0].used[1]]
        v = maps[0].apply_used(flat.row(term.own.v))
    else:
        v = values_of([term])[0].flatten(0, 1)
    weight = term.weight
    if isinstance(weight, Tensor):
        part = torch.bmm(p, v) * weight[:, None]
        return part if total is None else total + part
    if total is None:
        part = torch.bmm(p, v)
        return part if weight == 1.0 else part * weight
    return total.baddbmm_(p, v, alpha=weight)
