"""Queries that divide their attention between the row's own text and further ones.

    out = w_0(query) own + sum_r w_r(query) softmax(q k_r^T) v_r,      w_0 = 1 - sum_r w_r

`own` is whatever the other editors made of the row. On a joint site a further text stands where
the own one stood, beside the image: k_r = [k_image; k_r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.arguments import cast, remembered
from hookctl.attention.key_regions import KeyRegions
from hookctl.attention.query_lists import QueryLists, TextPlace
from hookctl.attention.rewriting import Fold, Rewriting
from hookctl.attention.term import Divided, Ref, Segment, Term
from hookctl.errors import InputError

Stacks = tuple[Tensor, Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class Division:
    """How the image's queries divide themselves; made once and used at every site of a grid.

    shares: context name -> weight of the image's queries [N], 0 to 1, at most 1 together; shifts:
    added to the scores of a context's tokens, [tokens], where some do not count.
    """

    shares: Mapping[str, Tensor]
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    _made: dict[Any, QueryWeights] = field(default_factory=dict, repr=False)

    @cached_property
    def nothing(self) -> bool:
        """Whether every query keeps to its own text."""
        return not any(bool(share.any()) for share in self.shares.values())

    def own(self) -> Tensor:
        """What is left for the row's own text, [N]."""
        return (1 - torch.stack(list(self.shares.values())).sum(0)).clamp(0, 1)

    @torch.inference_mode(False)  # kept for later calls, which may be learned through
    def over_queries(self, before: int, after: int, like: Tensor) -> QueryWeights:
        """The weights among all queries of a call: `before` and `after` the image's stand others,
        which keep to their own text."""
        key = (before, after, like.dtype, like.device)
        if key not in self._made:
            self._made[key] = QueryWeights(self, before, after, like)
        return self._made[key]


class QueryWeights:
    """The weights of a division for all queries of a call.

    A query of weight 0 has no part in a summand: `regions` leave it out of one, `lists` out of all.
    """

    def __init__(self, division: Division, before: int, after: int, like: Tensor) -> None:
        def padded(weight: Tensor, value: float) -> Tensor:
            return F.pad(weight, (before, after), value=value)

        full = {n: padded(w, 0.0) for n, w in division.shares.items() if bool(w.any())}
        own = padded(division.own(), 1.0)
        self.shares = {name: cast(weight, like) for name, weight in full.items()}
        self.own = cast(own, like)
        every: list[tuple[str | None, Tensor]] = [(None, own), *full.items()]
        self.shifts = {name: division.shifts.get(name) for name in full}
        self._every, self._like = dict(every), cast(own, like)
        self._queries = {name: (w > 0).long() for name, w in every}
        self._regions: dict[tuple[str | None, int], KeyRegions] = {}

    @cached_property
    @torch.inference_mode(False)
    def lists(self) -> QueryLists:
        shares = [self._every[name] for name in self.shares]
        return QueryLists(torch.stack(shares), list(self.shifts.values()), self._like)

    def regions(self, name: str | None, keys: int) -> KeyRegions | None:
        """The queries that take part in one summand (None: the own one); None for all of them."""
        queries = self._queries[name]
        if bool(queries.all()):
            return None
        if (name, keys) not in self._regions:
            seen = torch.ones(keys, dtype=torch.int64)
            self._regions[name, keys] = KeyRegions(queries, seen, self._like.device)
        return self._regions[name, keys]


def divided_alone(weights: QueryWeights, texts: Sequence[TextPlace], stacks: Stacks) -> Rewriting:
    """At a cross site, where the keys of a text are few: each query asks those it has a share in.

    texts: where that of each share stands; stacks: q, what k and v are parts of, and the scale.
    """
    shares, shifts = tuple(weights.shares.values()), tuple(weights.shifts.values())
    added = Divided(*stacks, weights.lists, shares, shifts, tuple(texts))

    def apply(state: Fold, row: int) -> None:
        terms = state.terms[row]
        own = weights.own
        state.terms[row] = tuple([t if t.extra else t.weighted(own) for t in terms])
        state.divided.setdefault(row, []).append(added)

    return apply


def divided(
    weights: QueryWeights,
    parts: Mapping[str, tuple[Tensor, Segment]],
    scale: float,
    images: tuple[int, int],
) -> Rewriting:
    """At a joint site, where a text stands beside the images.

    parts: context name -> the queries, and the keys and values of the images and of its text, as
    stacks of every row; images: where the images' stand among the row's own. What biases and
    restrictions say of those holds beside a further text too.
    """
    start, stop = images

    def further(name: str, row: int, own: Term) -> Term:
        q, segment = parts[name]
        here = segment._replace(k=segment.k._replace(row=row), v=segment.v._replace(row=row))
        regions = weights.regions(name, segment.tokens)
        if own.regions is not None:
            beside = own.regions.of_span(start, stop, segment.tokens - (stop - start))
            regions = beside if regions is None else beside.both(regions)
        return Term(
            Ref(q, row),
            (here,),
            scale,
            weight=weights.shares[name],
            factors=of_span(own.factors, start, stop),
            regions=regions,
            extra=True,
        )

    def own(term: Term) -> Term:
        if term.extra:
            return term
        regions = weights.regions(None, term.own.tokens)
        if regions is not None:
            regions = regions.extended(sum(s.tokens for s in term.segments[1:]))
            regions = term.regions.both(regions) if term.regions else regions
        return term.weighted(weights.own)._replace(regions=regions or term.regions)

    def apply(state: Fold, row: int) -> None:
        before = state.terms[row]
        first = next(term for term in before if not term.extra)
        added = [further(name, row, first) for name in parts]
        state.terms[row] = (*map(own, before), *added)

    return apply


Factors = tuple[tuple[Tensor | None, Tensor], ...]


def of_span(factors: Factors, start: int, stop: int) -> Factors:
    """Factors of queries and keys [M, r] for a span of the keys; those of further keys are 0."""
    found = []
    for queries, keys in factors:
        part = partial(keys.__getitem__, slice(start, stop))
        found.append((queries, remembered(part, ("span", start, stop), keys)))
    return tuple(found)


def check_shift(shift: Tensor | None, tokens: int, name: str, verb: str = "divide") -> None:
    """Raise InputError if the shift of a text is for another number of tokens."""
    if shift is not None and tuple(shift.shape) != (tokens,):
        raise InputError(
            f"{verb}: the shift of {name!r} is {tuple(shift.shape)}; its text has {tokens} tokens"
        )
