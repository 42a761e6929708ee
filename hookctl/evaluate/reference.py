"""Terms by explicit matrices, in float64: what every other evaluator must agree with.

It forms every N x M matrix and is slow on purpose. It also serves the escape hatch, where an
editor asks for the probabilities themselves. `marginals` sums the columns of a matrix over a few
queries at a time, s_m = sum_n A[n, m]: every query's softmax is complete in itself. So `of_queries`
forms the lines of a few queries alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.arguments import positions
from hookctl.attention.key_regions import KeyRegions
from hookctl.attention.term import Ref, Sum, Term
from hookctl.evaluate.gather import Scores, scores_of, weigh, weight_of
from hookctl.evaluate.sdpa import Piece

Edit = Callable[[Tensor], Tensor]


def evaluate(
    finished: Sum, rows: Sequence[int], dtype: torch.dtype | None = torch.float64
) -> list[Piece]:
    """The sums of some rows, in pieces [1, sub-batch, heads, N, channels] in the dtype of v."""
    pieces = []
    for row in rows:
        total: Tensor | None = None
        for p, values, _ in matrices(finished, row, dtype):
            part = p @ values.to(p.dtype)
            total = part if total is None else total + part
        assert total is not None  # a row has at least one term
        pieces.append(([row], total[None].to(finished.terms[row][0].own.v.base.dtype)))
    return pieces


def columns(
    finished: Sum, row: int, tokens: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """The edited probabilities of some of the row's own keys, [sub-batch, heads, N, t]."""
    own = [p for p, _, extra in matrices(finished, row, dtype) if not extra]
    return torch.stack([p[..., positions(tokens, p.device)] for p in own]).sum(0)


def matrices(
    finished: Sum, row: int, dtype: torch.dtype | None
) -> list[tuple[Tensor, Tensor, bool]]:
    """(probabilities [sub-batch, heads, N, M], values, whether they are an addition) of a row.

    Terms over the same own values are one matrix, the own keys first and those of extensions after
    them, and what an editor asked to do to the row's probabilities is done to it. Additions are
    softmaxes of their own and stay as they are.
    """
    groups: dict[Any, dict[Any, tuple[Tensor, Tensor]]] = {}
    for i, term in enumerate(finished.terms[row]):
        v = term.own.v
        blocks = groups.setdefault((i if term.extra else None, id(v.base), v.row), {})
        for key, p, values in _blocks(term, finished.mask, dtype):
            blocks[key] = (blocks[key][0] + p if key in blocks else p, values)
    found = []
    for (extra, *_), blocks in groups.items():
        p = torch.cat([p for p, _ in blocks.values()], -1)
        if extra is None:
            for edit in finished.functions.get(row, ()):
                p = edit(p)
        found.append((p, torch.cat([v for _, v in blocks.values()], -2), extra is not None))
    return found


def _blocks(
    term: Term, mask: Tensor | None, dtype: torch.dtype | None
) -> list[tuple[Any, Tensor, Tensor]]:
    """A term's probabilities, mapped and weighted, segment by segment, with their values."""
    p = probabilities(term, mask, dtype)
    weight = weight_of([term], p)
    p = weigh(p, weight[0] if isinstance(weight, Tensor) else weight)
    own, *rest = p.split([s.tokens for s in term.segments], -1)
    for value_map in reversed(term.maps):
        own = value_map.apply_to_probabilities(own)
    found: list[tuple[Any, Tensor, Tensor]] = [("own", own, term.own.v.tensor)]
    for segment, part in zip(term.segments[1:], rest, strict=True):
        if segment.counts:
            found.append((id(segment), part, segment.v.tensor))
    return found


def probabilities(term: Term, mask: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """The attention matrix of one term, [sub-batch, heads, N, M]; empty rows are 0.

    dtype: None for that of the queries; half precision is too coarse for scores, so these are
    formed in float32 at least, as fused kernels do.
    """
    parts = scores_of([term], mask)
    given = parts.q.dtype if dtype is None else dtype
    return _softmax(term, parts, torch.promote_types(given, torch.float32)).to(given)


def _softmax(term: Term, parts: Scores, dtype: torch.dtype) -> Tensor:
    q, k = parts.q[0].to(dtype), parts.k[0].to(dtype)
    if term.value_only:
        eye = torch.eye(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device)
        return eye.expand(*q.shape[:2], *eye.shape)
    scores = q @ k.mT * parts.scale
    if parts.bias is not None:
        bias = parts.bias.to(dtype)
        scores = scores + (bias[0] if bias.dim() == 5 else bias)
    if term.regions is not None:
        allowed = (term.regions.queries[:, None] & term.regions.keys[None]) != 0
        scores = scores.masked_fill(~allowed, float("-inf"))
    if parts.bias is None and term.regions is None:
        return scores.softmax(-1)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


_CHUNK = 256


def marginals(finished: Sum, row: int, queries: tuple[int, int]) -> Tensor:
    """The sums over queries start <= n < stop of the edited probabilities of a row's own keys.

    [sub-batch, heads, M], accumulated in float32 at least.
    """
    start, stop = queries
    if row in finished.functions:
        return _edited(finished, row)[..., start:stop, :].sum(-2)
    sums = [
        _sum_of_term(term, finished.mask, start, stop)
        for term in finished.terms[row]
        if not term.extra
    ]
    return torch.stack(sums).sum(0)


def of_queries(finished: Sum, row: int, queries: tuple[int, ...]) -> Tensor:
    """The edited probabilities of a row's own keys for some of its queries, in float32 at least:
    [sub-batch, heads, n, M]."""
    at = positions(queries, finished.terms[row][0].q.base.device)
    if row in finished.functions:
        return _edited(finished, row)[..., at, :]
    parts = []
    for term in finished.terms[row]:
        if not term.extra:
            p = _of_term(term, finished.mask, at)
            for value_map in reversed(term.maps):
                p = value_map.apply_to_probabilities(p)
            parts.append(p)
    return torch.stack(parts).sum(0)


def _edited(finished: Sum, row: int) -> Tensor:
    """The matrix of a row whose probabilities an editor asked for, [sub-batch, heads, N, M]."""
    return columns(finished, row, tuple(range(finished.terms[row][0].own.tokens)))


def _sum_of_term(term: Term, mask: Tensor | None, start: int, stop: int) -> Tensor:
    total: Tensor | None = None
    for first in range(start, stop, _CHUNK):
        p = _of_term(term, mask, slice(first, min(first + _CHUNK, stop))).sum(-2)
        total = p if total is None else total + p
    assert total is not None  # a site has queries
    for value_map in reversed(term.maps):
        total = value_map.apply_to_probabilities(total)
    return total


def _of_term(term: Term, mask: Tensor | None, at: slice | Tensor) -> Tensor:
    """The weighted probabilities of some queries over a term's own keys, before its value maps."""
    k, own = term.own.k.tensor, term.own.tokens
    if term.value_only:
        queries = torch.arange(term.q.base.shape[-2], device=k.device)[at]
        one_hot = F.one_hot(queries, own).to(torch.float32)
        p = one_hot.expand(*k.shape[:2], *one_hot.shape)
    else:
        part = mask if mask is None or mask.shape[-2] == 1 else mask[..., at, :]
        fine = torch.promote_types(k.dtype, torch.float32)
        p = probabilities(_narrowed(term, at), part, fine)[..., :own]
    return p * (term.weight[at][:, None] if isinstance(term.weight, Tensor) else term.weight)


def _narrowed(term: Term, at: slice | Tensor) -> Term:
    """The softmax of a term for some of its queries."""
    regions = term.regions
    return term._replace(
        q=Ref(term.q.base[..., at, :], term.q.row),
        factors=tuple((a if a is None else a[at], b) for a, b in term.factors),
        regions=regions and KeyRegions(regions.queries[at], regions.keys, regions.queries.device),
    )
