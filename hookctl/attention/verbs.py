"""What each verb of `AttentionCall` does to the terms of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.arguments import additive
from hookctl.attention.key_regions import KeyRegions
from hookctl.attention.rewriting import Fold, Probabilities, Rewriting
from hookctl.attention.spans import Spans
from hookctl.attention.term import Ref, Segment, Term
from hookctl.attention.token_map import ValueMap

_CHUNK = 1024  # image queries at a time


def borrow(sources: dict[str, Ref], mask_row: int | None, weight: Tensor | None) -> Rewriting:
    """sources: some of q, k, v; mask_row: row of the mask that comes with k; weight: [N]."""
    q = sources.get("q")
    changes: dict[str, Any] = {name: ref for name, ref in sources.items() if name != "q"}
    if "k" in sources:
        changes["mask_row"] = mask_row

    def apply(state: Fold, row: int) -> None:
        new: list[Term] = []
        for term in state.terms[row]:
            taken = term.with_own(q=q, **changes)
            if weight is None:
                new.append(taken)
            else:
                new += [taken.weighted(weight), term.weighted(1 - weight)]
        state.terms[row] = tuple(new)

    return apply


def replace_own(refs: dict[str, dict[int, Ref]], weight: Tensor | None = None) -> Rewriting:
    """refs: for some of q, k, v, what each row has instead of its own; weight: [N], None for 1."""

    def apply(state: Fold, row: int) -> None:
        q = refs["q"][row] if "q" in refs else None
        changes = {name: by_row[row] for name, by_row in refs.items() if name != "q"}
        terms = state.terms[row]
        taken = [t.with_own(q=q, **changes) for t in terms]
        if weight is not None:
            taken = [t.weighted(weight) for t in taken] + [t.weighted(1 - weight) for t in terms]
        state.terms[row] = tuple(taken)

    return apply


def extend(segment: Segment, share: float = 1.0) -> Rewriting:
    """share: weight of the extended form beside the own one."""

    def one(term: Term) -> tuple[Term, ...]:
        extended = term._replace(segments=(*term.segments, segment))
        if share == 1.0:
            return (extended,)
        return extended.weighted(share), term.weighted(1.0 - share)

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(part for term in state.terms[row] for part in one(term))

    return apply


def restrict(regions: KeyRegions) -> Rewriting:
    def one(term: Term) -> Term:
        allowed = regions.extended(sum(s.tokens for s in term.segments[1:]))
        return term._replace(regions=term.regions.both(allowed) if term.regions else allowed)

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(one(t) for t in state.terms[row])

    return apply


def bias(queries: Tensor | None, keys: Tensor) -> Rewriting:
    """queries: [N, r] or None for ones; keys: [M, r] or [M]."""
    of_keys = keys if keys.dim() == 2 else keys[:, None]
    if queries is None and of_keys.shape[1] > 1:
        of_keys = of_keys.sum(1, keepdim=True)
    pair = (queries, of_keys)

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(t._replace(factors=(*t.factors, pair)) for t in state.terms[row])

    return apply


def route(
    origin: int | None,
    from_source: ValueMap | None = None,
    from_own: ValueMap | None = None,
    *,
    vanishes: bool = False,
    stays: bool = True,
    queries: Tensor | None = None,
) -> Rewriting:
    """origin: the source row; from_source, from_own: what the maps of the source and of the row
    are multiplied by, None for nothing; vanishes: whether that leaves nothing of the own map;
    stays: whether keys that are not mapped keep the own map, or get the source's; queries: weight
    [N] of the queries that are edited, None for all."""

    def moved(state: Fold, row: int) -> list[Term]:
        """The source's probabilities over the row's values."""
        if origin is None or from_source is None:
            return []
        source, counts = state.before[origin], not stays
        if origin == row:
            return [_mapped(t, from_source, rest_counts=counts) for t in source]
        return [
            _mapped(t, from_source, rest_counts=counts, v=v, weight=weight)
            for v, weight in own_values(state, row)
            for t in source
        ]

    def apply(state: Fold, row: int) -> None:
        own = state.terms[row]
        new = moved(state, row)
        extended = stays and any(len(t.segments) > 1 for t in own)
        if from_own is not None and (extended or not vanishes):
            counts = stays or origin is None
            new += [_mapped(t, from_own, rest_counts=counts) for t in own]
        if queries is not None:
            new = [t.weighted(queries) for t in new]
            new += [t.weighted(1 - queries) for t in own]
        state.terms[row] = tuple(new)

    return apply


def _mapped(
    term: Term,
    value_map: ValueMap,
    *,
    rest_counts: bool,
    v: Ref | None = None,
    weight: Tensor | float = 1.0,
) -> Term:
    """weight * P L R V: the newest map is the first that the values pass, the own ones or v."""
    own, *rest = term.segments
    if v is not None:
        own = own._replace(v=v)
    if not rest_counts:
        rest = [s._replace(counts=False) for s in rest]
    return term._replace(
        maps=(value_map, *term.maps), segments=(own, *rest), weight=term.weight * weight
    )


def own_values(state: Fold, row: int) -> list[tuple[Ref, Tensor | float]]:
    """The values that a row's probabilities weigh, with their weights, which add up to 1."""
    terms = state.values[row]
    first = terms[0].own.v
    if all(t.own.v.base is first.base and t.own.v.row == first.row for t in terms[1:]):
        return [(first, 1.0)]
    return [(t.own.v, t.weight) for t in terms]


def map_queries(fn: Callable[[Tensor], Tensor]) -> Rewriting:
    """fn: maps a stack [rows, sub-batch, heads, N, channels] of queries to its like."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def one(term: Term) -> Term:
        # Stack by stack: rows of one stack are evaluated together.
        base = term.q.base
        if id(base) not in made:
            made[id(base)] = base, fn(base)
        return term._replace(q=Ref(made[id(base)][1], term.q.row))

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(one(t) for t in state.terms[row])

    return apply


def add(q: Tensor, segment: Segment, scale: float, weight: float, mask: Tensor | None) -> Rewriting:
    """A softmax of its own of the model's queries q over a segment; mask: [N]."""
    gain = weight if mask is None else mask * weight

    def apply(state: Fold, row: int) -> None:
        term = Term(Ref(q, row), (segment,), scale, weight=gain, extra=True)
        state.terms[row] = (*state.terms[row], term)

    return apply


def skip(weight: Tensor | None) -> Rewriting:
    """The values of the row as they are, at queries of `weight` [N] (None: all); what was added
    beside them stays."""

    def apply(state: Fold, row: int) -> None:
        terms = state.terms[row]
        first = terms[0]
        values = [
            first._replace(
                segments=(first.own._replace(v=v),),
                maps=(),
                weight=share,
                factors=(),
                regions=None,
                value_only=True,
            )
            for v, share in own_values(state, row)
        ]
        kept: list[Term] = []
        if weight is None:
            state.functions.pop(row, None)
        else:
            kept = [t.weighted(1 - weight) for t in terms if not t.extra]
            values = [t.weighted(weight) for t in values]
        state.terms[row] = (*kept, *values, *(t for t in terms if t.extra))

    return apply


def probabilities(fn: Probabilities) -> Rewriting:
    def apply(state: Fold, row: int) -> None:
        state.functions.setdefault(row, []).append(fn)

    return apply


def isolate(spans: Spans, mask: Tensor | None) -> Rewriting:
    """Image tokens of a joint site see themselves and all that is not of the image.

    On a self-attention site the identity in place of the probabilities is the values themselves. On
    a joint site only the image's own block becomes the identity (Ahn et al., arXiv 2403.17377, in
    the form of diffusers' joint processors): an image token attends to itself, to the text and to
    the references of an edit model,

        o_n = [exp(s_nn) v_n + sum_t exp(s_nt) v_t] / [exp(s_nn) + sum_t exp(s_nt)]

    and the queries of the others attend to everything as before. Scores of the others' keys alone
    are formed, [image tokens, other tokens].

    mask: the model's own, as a stack [rows | 1, sub-batch | 1, heads | 1, N | 1, M].
    """

    def one(term: Term) -> Term:
        row = term.own.mask_row
        own = None if mask is None or row is None else mask[row if mask.shape[0] > 1 else 0]
        v = _isolated(term, spans, own)
        segment = term.own._replace(v=Ref(v[None], 0))
        return term._replace(
            segments=(segment,), maps=(), factors=(), regions=None, value_only=True
        )

    def apply(state: Fold, row: int) -> None:
        before = [one(term) for term in state.values[row]]
        state.terms[row] = (*before, *(t for t in state.terms[row] if t.extra))
        state.functions.pop(row, None)

    return apply


def _isolated(term: Term, spans: Spans, mask: Tensor | None) -> Tensor:
    """[sub-batch, heads, N, channels]"""
    q, k, v = term.q.tensor, term.own.k.tensor, term.own.v.tensor
    assert spans.image_keys is not None  # a joint site
    (start, stop), (first, last) = spans.image_queries, spans.image_keys
    bias = None if mask is None else additive(mask, q)
    whole = [_plain(q, k, v, bias, slice(0, start), term.scale)]
    others_k, others_v = (torch.cat([x[..., :first, :], x[..., last:, :]], -2) for x in (k, v))
    fine = torch.promote_types(q.dtype, torch.float32)  # half precision is too coarse for scores
    others_k = others_k.to(fine)
    for begin in range(start, stop, _CHUNK):
        at = slice(begin, min(begin + _CHUNK, stop))
        itself = slice(at.start - start + first, at.stop - start + first)
        some = q[..., at, :].to(fine)
        scores = some @ others_k.mT * term.scale
        alone = (some * k[..., itself, :]).sum(-1, keepdim=True) * term.scale
        if bias is not None:
            rows = _rows(bias, at)
            scores = scores + torch.cat([rows[..., :first], rows[..., last:]], -1)
        p = torch.cat([alone, scores], -1).softmax(-1).to(v)
        whole.append(p[..., :1] * v[..., itself, :] + p[..., 1:] @ others_v)
    whole.append(_plain(q, k, v, bias, slice(stop, q.shape[-2]), term.scale))
    return torch.cat(whole, -2)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, queries: slice, scale: float
) -> Tensor:
    """The attention of some queries to everything."""
    mask = None if bias is None else _rows(bias, queries)
    return F.scaled_dot_product_attention(q[..., queries, :], k, v, mask, scale=scale)


def _rows(bias: Tensor, queries: slice) -> Tensor:
    """The part of a bias [..., N | 1, M] for some queries."""
    return bias if bias.shape[-2] == 1 else bias[..., queries, :]
