"""From terms to tensors: gather a batch of like terms, fold value maps, join biases.

Every evaluator starts here, so that they can differ in how they evaluate but not in what.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.attention.term import Segment, Term, ValueMap, gather


@dataclass(frozen=True, eq=False)
class Scores:
    """What the scores of a batch of terms are made of.

    q, k: stacks [rows, sub-batch, heads, tokens, channels]; bias: additive, broadcastable to
    [rows, sub-batch, heads, N, M], or None.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    scale: float


def scores_of(terms: list[Term], mask: Tensor | None, *, widen: bool = False) -> Scores:
    """Gather the queries and keys of terms of equal form.

    widen: carry rank-r biases as extra channels of q and k instead of in `bias`, so that no
    N x M tensor is made.
    """
    first = terms[0]
    q = gather([term.q for term in terms])
    k = _join([gather([t.segments[i].k for t in terms]) for i in range(len(first.segments))])
    bias = _key_bias(terms, mask, k)
    for queries, keys in first.factors:
        keys = torch.nn.functional.pad(keys, (0, 0, 0, k.shape[-2] - keys.shape[0]))
        if widen:
            q = torch.cat([q, queries.expand(*q.shape[:-1], -1)], -1)
            k = torch.cat([k, (keys / first.scale).expand(*k.shape[:-1], -1)], -1)
        else:
            low_rank = queries @ keys.mT
            bias = low_rank if bias is None else bias + low_rank
    return Scores(q, k, bias, first.scale)


def values_of(terms: list[Term]) -> Tensor:
    """The values of terms of equal signature, mapped: [rows, sub-batch, heads, M, channels]."""
    first = terms[0]
    own = gather([term.own.v for term in terms])
    for i in range(len(first.maps)):
        own = map_values(own, [term.maps[i] for term in terms])
    rest = [gather([t.segments[i].v for t in terms]) for i in range(1, len(first.segments))]
    return _join([own, *rest])


def weight_of(terms: list[Term], like: Tensor) -> Tensor | float:
    """The weights of like terms: a number, or [rows, 1, 1, N, 1] in the dtype of `like`."""
    first = terms[0].weight
    if not isinstance(first, Tensor):
        return first
    weights = [t.weight for t in terms if isinstance(t.weight, Tensor)]
    return torch.stack(weights).to(like)[:, None, None, :, None]


def map_values(v: Tensor, maps: list[ValueMap], *, stacked: bool = True) -> Tensor:
    """Apply one value map per row to v [rows, sub-batch, heads, tokens, channels].

    stacked=False: apply the single map to any [..., tokens, channels].
    """
    first = maps[0]
    shared = not stacked or all(m.matrix is first.matrix for m in maps)
    matrix = first.matrix if shared else torch.stack([m.matrix for m in maps])[:, None, None]
    matrix = matrix.to(v)
    start, stop = first.start, first.start + first.matrix.shape[-1]
    part = v[..., start:stop, :]
    mapped = matrix[..., None] * part if first.diagonal else matrix @ part
    if start == 0 and stop == v.shape[-2]:
        return mapped
    outside = (v[..., :start, :] * first.rest, mapped, v[..., stop:, :] * first.rest)
    return torch.cat(outside, -2)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _key_bias(terms: list[Term], mask: Tensor | None, k: Tensor) -> Tensor | None:
    columns = [
        _segment_bias([t.segments[i] for t in terms], mask) for i in range(len(terms[0].segments))
    ]
    if all(column is None for column in columns):
        return None
    if len(columns) == 1:
        return columns[0]
    shape = torch.broadcast_shapes(*(c.shape[:-1] for c in columns if c is not None))
    filled = [
        k.new_zeros(*shape, s.tokens) if c is None else c.to(k.dtype).expand(*shape, s.tokens)
        for c, s in zip(columns, terms[0].segments, strict=True)
    ]
    return torch.cat(filled, -1)


def _segment_bias(segments: list[Segment], mask: Tensor | None) -> Tensor | None:
    first = segments[0]
    bias = None
    if mask is not None and first.mask_row is not None:
        rows = [0 if mask.shape[0] == 1 else s.mask_row or 0 for s in segments]
        bias = mask[rows] if mask.shape[0] > 1 else mask
        if bias.dtype == torch.bool:
            dtype = first.k.base.dtype
            bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device).masked_fill(
                ~bias, float("-inf")
            )
    if first.shift is not None:
        shifts = [
            torch.as_tensor(s.shift, dtype=first.k.base.dtype, device=first.k.base.device).expand(
                first.tokens
            )
            for s in segments
        ]
        shift = torch.stack(shifts)[:, None, None, None, :]
        bias = shift if bias is None else bias + shift
    return bias
