"""Terms by `scaled_dot_product_attention`: no attention matrix, any device, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.arguments import additive, positions
from hookctl.attention.key_regions import KeyRegions
from hookctl.attention.term import Sum, Term
from hookctl.evaluate.gather import (
    Scores,
    plus,
    rows_of,
    scores_of,
    values_of,
    weigh,
    weight_of,
)

# Queries that see the same keys attend together; of more kinds than this, a mask is made for a
# chunk of queries at a time.
_MOST_KINDS = 64
_QUERY_CHUNK = 256

# Up to this many scores of one head, a dense mask costs less than a call for each kind of query.
# Measured on a CPU: hookctl bench calls.
_FEW_SCORES = 128 * 128

# Up to this many elements of all queries, copies of them cost a CPU less than a call of SDPA does.
# Measured: hookctl bench calls.
_FEW_QUERIES = 2**16

# Fused kernels want whole groups of channels.
_CHANNELS = 8

Piece = tuple[list[int], Tensor]
Attend = Callable[[Scores, Tensor, KeyRegions | None], Tensor]


def evaluate(finished: Sum, rows: Sequence[int], by: Attend | None = None) -> list[Piece]:
    """The sums of some rows, in pieces [rows, sub-batch, heads, N, channels].

    by: what evaluates one attention, `attend` by default.
    """
    by, pieces, copying = by or attend, [], _copies_pay(finished)
    if copying and finished.mask is None and (exchanged := _exchanged_rows(finished, rows)):
        return [(list(rows), by(*exchanged, None))]
    for group in finished.groups(rows, copying=copying):
        if not finished.terms.keys().isdisjoint(group):
            part = batch([finished.terms[row] for row in group], finished.mask, by)
        else:
            part = by(*untouched(finished, group), None)
        pieces.append((group, part))
    return pieces


def _copies_pay(finished: Sum) -> bool:
    """Whether one call over copies of all rows costs less than two whose outputs are put together.
    On a GPU it asks for fewer launches, and moves as many bytes."""
    q, mask = finished.terms[0][0].q.base, finished.mask
    of_keys = mask is None or mask.shape[-2] == 1
    return of_keys and (q.device.type != "cpu" or q.numel() <= _FEW_QUERIES)


def _exchanged_rows(finished: Sum, rows: Sequence[int]) -> tuple[Scores, Tensor] | None:
    """Scores and values of rows that at most take tensors from one another (a borrowed map, say),
    gathered for one call; None where a row was rewritten in another way."""
    first = finished.terms[rows[0]][0]
    q, k, v = first.q.base, first.own.k.base, first.own.v.base
    of_q, of_k, of_v = list[int](), list[int](), list[int]()
    for row in rows:
        term, *others = finished.terms[row]
        own = term.segments[0]
        alike = term.q.base is q and own.k.base is k and own.v.base is v
        if others or not alike or not term.bare or term.scale != first.scale:
            return None
        of_q.append(term.q.row)
        of_k.append(own.k.row)
        of_v.append(own.v.row)
    return Scores(rows_of(q, of_q), rows_of(k, of_k), None, first.scale), rows_of(v, of_v)


def untouched(finished: Sum, rows: Sequence[int]) -> tuple[Scores, Tensor]:
    """Scores and values of adjacent rows that nothing rewrote, read where they lie."""
    (plain,), mask = finished.terms[rows[0]], finished.mask
    run = slice(rows[0], rows[-1] + 1)
    q, k, v = plain.q.base[run], plain.own.k.base[run], plain.own.v.base[run]
    bias = None if mask is None else additive(mask if mask.shape[0] == 1 else mask[run], q)
    return Scores(q, k, bias, plain.scale), v


def batch(rows: list[tuple[Term, ...]], mask: Tensor | None, by: Attend) -> Tensor:
    """The sums of rows of like terms."""
    total: Tensor | None = None
    owned = False  # whether nobody else has what is in `total`
    for place in range(len(rows[0])):
        terms = [row[place] for row in rows]
        part = values_of(terms)
        if not terms[0].value_only:
            part = by(scores_of(terms, mask, widen=True), part, terms[0].regions)
        weight = weight_of(terms, part)
        if total is None:
            total = weigh(part, weight)
            owned = total is not part or not terms[0].value_only
        else:
            total, owned = plus(total, part, weight, in_place=owned), True
    assert total is not None  # a row has at least one term
    return total


def attend(scores: Scores, v: Tensor, regions: KeyRegions | None = None) -> Tensor:
    """One attention over stacks, [rows, sub-batch, heads, N, channels of v]."""
    if regions is not None:
        return _by_region(scores, v, regions)
    q, k = scores.q, scores.k
    channels = v.shape[-1]
    narrow = not q.shape[-1] == k.shape[-1] == channels
    if narrow:
        # The fused kernels take one width; zero channels change no score.
        width = -(-max(q.shape[-1], channels) // _CHANNELS) * _CHANNELS
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    alone = q.shape[1] == 1
    out = F.scaled_dot_product_attention(
        q.squeeze(1) if alone else q.flatten(0, 1),
        k.squeeze(1) if alone else k.flatten(0, 1),
        v.squeeze(1) if alone else v.flatten(0, 1),
        attn_mask=None if scores.bias is None else _flat_bias(scores.bias, q),
        scale=scores.scale,
    )
    out = out.unsqueeze(1) if alone else out.unflatten(0, q.shape[:2])
    return out[..., :channels] if narrow else out


def _flat_bias(bias: Tensor, q: Tensor) -> Tensor:
    bias = bias.to(q.dtype)
    if bias.shape[0] == bias.shape[1] == 1:
        return bias[0]
    return bias.expand(q.shape[0], q.shape[1], *bias.shape[2:]).flatten(0, 1)


def _by_region(scores: Scores, v: Tensor, regions: KeyRegions) -> Tensor:
    """Queries of one kind share their keys: attend kind by kind, without a mask."""
    if scores.q.shape[-2] * scores.k.shape[-2] <= _FEW_SCORES:
        return _by_mask(scores, v, regions)
    if regions.kinds > _MOST_KINDS:
        return _by_chunk(scores, v, regions)
    out = v.new_zeros(*scores.q.shape[:-1], v.shape[-1])
    for queries, keys in regions.blocks:
        bias = scores.bias
        if bias is not None:
            bias = _some(bias, keys, -1)
            bias = _some(bias, queries, -2) if bias.shape[-2] > 1 else bias
        part = Scores(_some(scores.q, queries, -2), _some(scores.k, keys, -2), bias, scores.scale)
        block = attend(part, _some(v, keys, -2))
        if queries is None:
            return block
        out = out.index_copy_(-2, queries, block)
    return out


def _by_mask(scores: Scores, v: Tensor, regions: KeyRegions) -> Tensor:
    """Few tokens: one dense mask, made once."""
    bias, empty = regions.mask(scores.q)
    if scores.bias is not None:
        bias = bias + scores.bias
    out = attend(Scores(scores.q, scores.k, bias, scores.scale), v)
    return out if empty is None else out.masked_fill(empty, 0.0)


def _some(x: Tensor, positions: Tensor | None, dim: int) -> Tensor:
    return x if positions is None else x.index_select(dim, positions)


def _by_chunk(scores: Scores, v: Tensor, regions: KeyRegions) -> Tensor:
    """Many kinds of queries: a dense mask, but only for a chunk of queries at a time."""
    parts = []
    for start in range(0, scores.q.shape[-2], _QUERY_CHUNK):
        chunk = slice(start, start + _QUERY_CHUNK)
        allowed = (regions.queries[chunk, None] & regions.keys[None]) != 0
        bias = scores.q.new_zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
        bias = bias[None, None, None]
        if scores.bias is not None:
            own = scores.bias
            bias = bias + (own[..., chunk, :] if own.shape[-2] > 1 else own)
        part = Scores(scores.q[..., chunk, :], scores.k, bias, scores.scale)
        empty = ~allowed.any(-1)[:, None]
        parts.append(attend(part, v).masked_fill(empty, 0.0))
    return torch.cat(parts, -2)


def columns(
    term: Term, mask: Tensor | None, tokens: tuple[int, ...], *, joined: bool = False
) -> Tensor:
    """Probabilities of some keys, mapped and weighted as the term is: [sub-batch, heads, N, t].

    The columns are attention over one-hot values, so they too need no matrix. joined: their sum, as
    one column.
    """
    scores = scores_of([term], mask, widen=True)
    one_hot = one_hot_values(term, tokens, scores.q, joined=joined)
    if term.value_only:
        out = one_hot.expand(*scores.q.shape[1:3], *one_hot.shape)
    else:
        out = attend(scores, one_hot.expand(*scores.q.shape[:3], *one_hot.shape), term.regions)[0]
    weight = weight_of([term], out)
    return weigh(out, weight[0] if isinstance(weight, Tensor) else weight)


def one_hot_values(
    term: Term, tokens: tuple[int, ...], like: Tensor, *, joined: bool = False
) -> Tensor:
    """Values that turn attention into the columns `tokens` of the row's own keys, mapped; joined:
    into their sum."""
    place = positions(tokens, like.device)
    if joined:
        own = like.new_zeros(term.own.tokens, 1).index_fill_(0, place, 1)
    else:
        own = (torch.arange(term.own.tokens, device=like.device)[:, None] == place).to(like.dtype)
    for value_map in term.maps:
        own = value_map.apply(own)
    return F.pad(own, (0, 0, 0, sum(s.tokens for s in term.segments[1:])))
