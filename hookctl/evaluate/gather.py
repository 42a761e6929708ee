"""From terms to tensors: gather a batch of like terms, fold value maps, join biases.

Every evaluator starts here, so that they can differ in how they evaluate but not in what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from hookctl.attention.arguments import additive, positions
from hookctl.attention.term import Ref, Segment, Term
from hookctl.attention.token_map import ValueMap


@dataclass(slots=True, eq=False)
class Scores:
    """What the scores of a batch of terms are made of.

    q, k: stacks [rows, sub-batch, heads, tokens, channels]; bias: additive, broadcastable to
    [rows, sub-batch, heads, N, M], or None.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    scale: float


def gather(refs: Sequence[Ref]) -> Tensor:
    """The rows of one stack as a batch, [len(refs), sub-batch, heads, tokens, channels]."""
    return rows_of(refs[0].base, [ref.row for ref in refs])


def rows_of(base: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a stack; copies nothing if they are adjacent or all the same."""
    if adjacent(rows):
        return base if len(rows) == len(base) else base[rows[0] : rows[-1] + 1]
    if len(set(rows)) == 1:
        return base[rows[0] : rows[0] + 1].expand(len(rows), *base.shape[1:])
    if base.requires_grad:  # indexing adds gradients in no fixed order
        return torch.stack([base[row] for row in rows])
    places = positions(tuple(rows), base.device)
    if base.dim() == 5 and base.stride(-2) > base.stride(-3):  # copied as they lie
        return base.transpose(2, 3).index_select(0, places).transpose(2, 3)
    return base.index_select(0, places)


def adjacent(rows: Sequence[int]) -> bool:
    """Whether rows follow each other without a gap."""
    return len(rows) == 1 or list(rows) == list(range(rows[0], rows[0] + len(rows)))


def scores_of(terms: Sequence[Term], mask: Tensor | None, *, widen: bool = False) -> Scores:
    """Gather the queries and keys of terms of equal form.

    widen: carry rank-r biases as extra channels of q and k instead of in `bias`, so that no
    N x M tensor is made.
    """
    first = terms[0]
    q = gather([term.q for term in terms])
    k = _join([gather([t.segments[i].k for t in terms]) for i in range(len(first.segments))])
    scores = Scores(q, k, key_bias(terms, mask), first.scale)
    if first.factors and widen:
        _widen(scores, first)
    elif first.factors:
        low_rank = factors_bias(first)
        scores.bias = low_rank if scores.bias is None else scores.bias + low_rank
    return scores


def _widen(scores: Scores, term: Term) -> None:
    tokens = scores.k.shape[-2]
    q, k = [scores.q], [scores.k]
    # The scale is undone on both sides, or -1e4 for a key would be infinite in half precision.
    of_queries = 2.0 ** round(-math.log2(term.scale) / 2)
    for queries, keys in term.factors:
        if queries is None:
            queries = keys.new_ones(scores.q.shape[-2], 1)
        keys = F.pad(keys, (0, 0, 0, tokens - keys.shape[0])) / (term.scale * of_queries)
        q.append((queries * of_queries).expand(*scores.q.shape[:-1], -1))
        k.append(keys.expand(*scores.k.shape[:-1], -1))
    scores.q, scores.k = torch.cat(q, -1), torch.cat(k, -1)


def factors_bias(term: Term) -> Tensor:
    """The rank-r biases of a term written out, [N | 1, M]."""
    total: Tensor | None = None
    tokens = sum(s.tokens for s in term.segments)
    for queries, keys in term.factors:
        bias = keys.mT if queries is None else queries @ keys.mT
        total = bias if total is None else total + bias
    assert total is not None  # the caller saw that there are factors
    return F.pad(total, (0, tokens - total.shape[-1]))


def values_of(terms: Sequence[Term]) -> Tensor:
    """The values of terms of equal signature, mapped: [rows, sub-batch, heads, M, channels]."""
    first = terms[0]
    own = gather([term.own.v for term in terms])
    for i in range(len(first.maps)):
        own = _mapped(own, [term.maps[i] for term in terms])
    if len(first.segments) == 1:
        return own
    rest = [gather([t.segments[i].v for t in terms]) for i in range(1, len(first.segments))]
    rest = [
        v if s.counts else v.new_zeros(1).expand_as(v)
        for s, v in zip(first.segments[1:], rest, strict=True)
    ]
    return _join([own, *rest])


def _mapped(v: Tensor, maps: list[ValueMap]) -> Tensor:
    """One value map per row."""
    if all(m is maps[0] for m in maps):
        return maps[0].apply(v)
    return torch.stack([m.apply(row) for m, row in zip(maps, v, strict=True)])


def weight_of(terms: Sequence[Term], like: Tensor) -> Tensor | float:
    """The weights of like terms: a number, or [rows, 1, 1, N, 1] in the dtype of `like`."""
    if not isinstance(terms[0].weight, Tensor):
        return terms[0].weight
    weights = [t.weight for t in terms if isinstance(t.weight, Tensor)]
    return torch.stack(weights).to(like)[:, None, None, :, None]


def weigh(part: Tensor, weight: Tensor | float) -> Tensor:
    return part * weight if isinstance(weight, Tensor) or weight != 1.0 else part


def plus(total: Tensor, part: Tensor, weight: Tensor | float, *, in_place: bool) -> Tensor:
    """total + weight * part in one pass; in_place: into `total`, where nothing else needs it."""
    in_place = in_place and total.dtype == part.dtype  # under autocast they may differ
    in_place = in_place and not (followed(total) or followed(part) or followed(weight))
    if isinstance(weight, Tensor):
        add = Tensor.addcmul_ if in_place else torch.addcmul
        return add(total, part, weight)
    if in_place:
        return total.add_(part, alpha=weight)
    return torch.add(total, part, alpha=weight)


def followed(value: Tensor | float) -> bool:
    """Whether a gradient is wanted of a tensor, or functions of it are transformed."""
    if not isinstance(value, Tensor):
        return False
    return (torch.is_grad_enabled() and value.requires_grad) or is_functorch_wrapped_tensor(value)


def key_bias(terms: Sequence[Term], mask: Tensor | None) -> Tensor | None:
    """The model's mask and the shifts of segments, [rows | 1, ..., N | 1, M], or None."""
    first = terms[0]
    if mask is None and all(s.shift is None for s in first.segments):
        return None
    columns = [
        segment_bias([t.segments[i] for t in terms], mask) for i in range(len(first.segments))
    ]
    if all(column is None for column in columns):
        return None
    if len(columns) == 1:
        return columns[0]
    shape = torch.broadcast_shapes(*(c.shape[:-1] for c in columns if c is not None))
    filled = [
        s.k.base.new_zeros(1).expand(*shape, s.tokens)
        if c is None
        else c.to(s.k.base.dtype).expand(*shape, s.tokens)
        for c, s in zip(columns, first.segments, strict=True)
    ]
    return torch.cat(filled, -1)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def segment_bias(segments: list[Segment], mask: Tensor | None) -> Tensor | None:
    first = segments[0]
    bias = None
    if mask is not None and first.mask_row is not None:
        rows = [s.mask_row or 0 for s in segments]
        bias = additive(mask if mask.shape[0] == 1 else rows_of(mask, rows), first.k.base)
    if first.shift is not None:
        shift = torch.stack([_shift(s) for s in segments])[:, None, None, None, :]
        bias = shift if bias is None else bias + shift
    return bias


def _shift(segment: Segment) -> Tensor:
    base = segment.k.base
    if isinstance(segment.shift, Tensor):
        return segment.shift.to(base).expand(segment.tokens)
    return base.new_full((1,), float(segment.shift or 0.0)).expand(segment.tokens)
