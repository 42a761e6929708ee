"""Terms by `scaled_dot_product_attention`: no attention matrix, any device, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.assemble import Scores, map_values, scores_of, values_of, weight_of
from hookctl.attention.term import Regions, Term

# Read-outs over long keys go through one-hot values; more columns than this need several passes.
_MOST_LABELS = 64
_QUERY_CHUNK = 256


def evaluate(rows: list[tuple[Term, ...]], mask: Tensor | None) -> Tensor:
    """The sums of rows of like terms, [rows, sub-batch, heads, N, channels]."""
    total: Tensor | None = None
    for place in range(len(rows[0])):
        terms = [row[place] for row in rows]
        part = values_of(terms)
        if not terms[0].value_only:
            scores = scores_of(terms, mask, widen=terms[0].regions is None)
            part = attend(scores, part, terms[0].regions)
        weight = weight_of(terms, part)
        if isinstance(weight, Tensor) or weight != 1.0:
            part = part * weight
        total = part if total is None else total + part
    assert total is not None  # a row has at least one term
    return total


def attend(scores: Scores, v: Tensor, regions: Regions | None = None) -> Tensor:
    """One attention over stacks, [rows, sub-batch, heads, N, channels of v]."""
    if regions is not None:
        return _by_region(scores, v, regions)
    q, k = scores.q, scores.k
    channels = v.shape[-1]
    width = max(q.shape[-1], channels)
    if not q.shape[-1] == k.shape[-1] == channels:
        # The fused CPU and CUDA kernels take one width; zero channels change no score.
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        attn_mask=_flat_bias(scores.bias, q),
        scale=scores.scale,
    )
    return out.unflatten(0, q.shape[:2])[..., :channels]


def _flat_bias(bias: Tensor | None, q: Tensor) -> Tensor | None:
    if bias is None:
        return None
    bias = bias.to(q.dtype)
    while bias.dim() < 5:
        bias = bias[None]
    if bias.shape[0] == bias.shape[1] == 1:
        return bias[0]
    return bias.expand(q.shape[0], q.shape[1], *bias.shape[2:]).flatten(0, 1)


def _by_region(scores: Scores, v: Tensor, regions: Regions) -> Tensor:
    """Queries with equal bit sets share their keys: attend label by label, without a mask."""
    labels, which = regions.queries.unique(return_inverse=True)
    if len(labels) > _MOST_LABELS:
        return _by_chunk(scores, v, regions)
    out = v.new_zeros(*scores.q.shape[:-1], v.shape[-1])
    for i, label in enumerate(labels):
        queries = (which == i).nonzero()[:, 0]
        keys = ((regions.keys & label) != 0).nonzero()[:, 0]
        if not len(keys):
            continue
        bias = scores.bias
        if bias is not None:
            bias = bias[..., keys]
            bias = bias[..., queries, :] if bias.shape[-2] > 1 else bias
        part = Scores(scores.q[..., queries, :], scores.k[..., keys, :], bias, scores.scale)
        out = out.index_copy(-2, queries, attend(part, v[..., keys, :]))
    return out


def _by_chunk(scores: Scores, v: Tensor, regions: Regions) -> Tensor:
    """Many labels: a dense mask, but only for a chunk of queries at a time."""
    parts = []
    for start in range(0, scores.q.shape[-2], _QUERY_CHUNK):
        chunk = slice(start, start + _QUERY_CHUNK)
        allowed = (regions.queries[chunk, None] & regions.keys[None]) != 0
        bias = torch.zeros(allowed.shape, dtype=scores.q.dtype, device=scores.q.device)
        bias = bias.masked_fill(~allowed, float("-inf"))
        if scores.bias is not None:
            own = scores.bias
            bias = bias + (own[..., chunk, :] if own.shape[-2] > 1 else own)
        part = Scores(scores.q[..., chunk, :], scores.k, bias, scores.scale)
        empty = ~allowed.any(-1)[:, None]
        parts.append(attend(part, v).masked_fill(empty, 0.0))
    return torch.cat(parts, -2)


def columns(term: Term, mask: Tensor | None, tokens: tuple[int, ...]) -> Tensor:
    """Probabilities of some keys, mapped and weighted as the term is: [sub-batch, heads, N, t].

    The columns are attention over one-hot values, so they too need no matrix.
    """
    scores = scores_of([term], mask, widen=term.regions is None)
    one_hot = scores.k.new_zeros(scores.k.shape[-2], len(tokens))
    one_hot[list(tokens), range(len(tokens))] = 1
    own, rest = one_hot[: term.own.tokens], one_hot[term.own.tokens :]
    for value_map in term.maps:
        own = map_values(own, [value_map], stacked=False)
    one_hot = torch.cat([own, rest])
    if term.value_only:
        out = one_hot.expand(*scores.q.shape[1:3], *one_hot.shape)
    else:
        out = attend(scores, one_hot.expand(*scores.q.shape[:3], *one_hot.shape), term.regions)[0]
    weight = weight_of([term], out)
    return out * (weight[0] if isinstance(weight, Tensor) else weight)
