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
    for place, row in enumerate(rows):
        for term in finished.terms[row]:
            users.setdefault(_key(term), []).append((place, term))
    out = _unwritten(finished.terms[rows[0]][0], len(rows))
    places, unread = out.flatten(1, 2), _unread(out)
    flat, begun = _Flat(), set[int]()
    for uses in users.values():
        p = _probabilities(uses[0][1], finished.mask, flat, unread)
        for place, term in uses:
            _add(places[place], p, term, flat, beta=float(place in begun))
            begun.add(place)
    return [(list(rows), out)]


def _unwritten(like: Term, rows: int) -> Tensor:
    """[rows, sub-batch, heads, N, channels], never read before it is written."""
    q = like.q.base
    _, sub, heads, tokens, _ = q.shape
    channels = like.own.v.base.shape[-1]
    if sub > 1:
        return q.new_empty(rows, sub, heads, tokens, channels)
    # Tokens before heads: merging the heads afterwards copies nothing.
    return q.new_empty(rows, sub, tokens, heads, channels).transpose(2, 3)


def _key(term: Term) -> tuple[Any, ...]:
    """Terms of equal key have equal probabilities."""
    key: tuple[Any, ...] = (id(term.q.base), term.q.row, *map(id, term.factors))
    for s in term.segments:
        key += (id(s.k.base), s.k.row, s.mask_row, id(s.shift))
    return key


def _probabilities(term: Term, mask: Tensor | None, flat: _Flat, unread: Tensor) -> Tensor:
    """[sub-batch * heads, N, M]; rows without any allowed key are 0."""
    q = flat.row(term.q)
    own, *rest = term.segments
    k = flat.row(own.k)
    if rest:
        k = torch.cat([k, *(flat.row(s.k) for s in rest)], -2)
    scores = torch.baddbmm(unread, q, k.mT, beta=0, alpha=term.scale)
    if term.factors:
        scores = scores + factors_bias(term)
    bare = mask is None and own.shift is None and not rest
    bias = None if bare else key_bias([term], mask)
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


def _add(total: Tensor, p: Tensor, term: Term, flat: _Flat, beta: float) -> None:
    """total = beta * total + weight * P V, [sub-batch * heads, N, channels], in place."""
    maps, (own, *rest), weight = term.maps, term.segments, term.weight
    if not maps and not rest:
        v = flat.row(own.v)
    elif len(maps) == 1 and not rest and maps[0].covers(p.shape[-1]):
        used = maps[0].used
        if used is not None and used != (0, p.shape[-1]):
            p = p[..., used[0] : used[1]]
        v = maps[0].apply_used(flat.row(own.v))
    else:
        v = values_of([term])[0].flatten(0, 1)
    if isinstance(weight, Tensor):
        p, weight = p * weight[:, None], 1.0
    total.baddbmm_(p, v, beta=beta, alpha=weight)
