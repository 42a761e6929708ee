"""What the verbs of `AttentionCall` do to terms, once all editors have spoken.

Each operation rewrites the terms of its rows. They are folded stage by stage, so that editors
compose in whatever order they spoke; inside a stage they are folded in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from hookctl.address.rows import Row
from hookctl.attention.term import Ref, Segment, Sum, Term, Terms
from hookctl.attention.token_map import ValueMap
from hookctl.attention.visibility import Regions


class Stage(IntEnum):
    """The order in which operations are folded into terms."""

    SUBSTITUTION = 0
    EXTENSION = 1
    RESTRICTION = 2
    TOKEN_MAP = 3
    ADDITION = 4
    OVERRIDE = 5
    READ_OUT = 6


Probabilities = Callable[[Tensor], Tensor]
Sink = Callable[[Row, Tensor], None]


@dataclass(eq=False, slots=True)
class Fold:
    """The state of a fold.

    terms: as rewritten so far; before: as they were when the stage began; values: per row that was
    substituted, the terms whose values and weights make up its own values; functions: what edits
    the probabilities of a row.
    """

    terms: Terms
    before: Terms
    values: Terms
    functions: dict[int, list[Probabilities]]


class Operation(NamedTuple):
    """One use of a verb by one editor."""

    stage: Stage
    editor: Any
    verb: str
    rows: tuple[int, ...]
    apply: Callable[[Fold, int], None]


class ReadOut(NamedTuple):
    """A request for the probabilities of some key tokens, averaged over heads.

    summed: over the image's queries, in place of one value for each; heads: one value for each
    head, in place of their mean; editor: who asks.
    """

    row: Row
    tokens: tuple[int, ...]
    into: Sink
    summed: bool = False
    heads: bool = False
    editor: Any = None


_stage = attrgetter("stage")


def folded(
    plain: Callable[[int], Term], operations: Iterable[Operation], rows: int, mask: Tensor | None
) -> Sum:
    """The finished sum of a call of `rows` rows: every operation applied, stage by stage."""
    terms = Terms(plain)
    state = Fold(terms, terms, terms, {})
    stage = Stage.SUBSTITUTION
    for operation in sorted(operations, key=_stage):
        if operation.stage is not stage:
            state.before = terms.snapshot()
            if stage is Stage.SUBSTITUTION:
                state.values = state.before
            stage = operation.stage
        for row in operation.rows:
            operation.apply(state, row)
    return Sum(terms, rows, mask, state.functions)


def borrow(
    sources: dict[str, Ref], mask_row: int | None, weight: Tensor | None
) -> Callable[[Fold, int], None]:
    """sources: some of q, k, v; mask_row: row of the mask that comes with k; weight: [N]."""
    q = sources.get("q")
    changes: dict[str, Any] = {name: ref for name, ref in sources.items() if name != "q"}
    if "k" in sources:
        changes["mask_row"] = mask_row

    def one(term: Term) -> Term:
        return term.with_own(q=q, **changes)

    def apply(state: Fold, row: int) -> None:
        terms = state.terms[row]
        if weight is None:
            state.terms[row] = tuple(one(t) for t in terms)
        else:
            state.terms[row] = tuple(
                part for t in terms for part in (one(t).weighted(weight), t.weighted(1 - weight))
            )

    return apply


def replace_own(refs: dict[str, dict[int, Ref]]) -> Callable[[Fold, int], None]:
    """refs: for some of q, k, v, what each row has instead of its own."""

    def apply(state: Fold, row: int) -> None:
        q = refs["q"][row] if "q" in refs else None
        changes = {name: by_row[row] for name, by_row in refs.items() if name != "q"}
        state.terms[row] = tuple(t.with_own(q=q, **changes) for t in state.terms[row])

    return apply


def extend(segment: Segment, share: float = 1.0) -> Callable[[Fold, int], None]:
    """share: weight of the extended form beside the own one."""

    def one(term: Term) -> tuple[Term, ...]:
        extended = term._replace(segments=(*term.segments, segment))
        if share == 1.0:
            return (extended,)
        return extended.weighted(share), term.weighted(1.0 - share)

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(part for term in state.terms[row] for part in one(term))

    return apply


def restrict(regions: Regions) -> Callable[[Fold, int], None]:
    def one(term: Term) -> Term:
        allowed = regions.extended(sum(s.tokens for s in term.segments[1:]))
        return term._replace(regions=term.regions.both(allowed) if term.regions else allowed)

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(one(t) for t in state.terms[row])

    return apply


def bias(queries: Tensor | None, keys: Tensor) -> Callable[[Fold, int], None]:
    """queries: [N, r] or None for ones; keys: [M, r]."""
    pair = (queries, keys)

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
) -> Callable[[Fold, int], None]:
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


def map_queries(fn: Callable[[Tensor], Tensor]) -> Callable[[Fold, int], None]:
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


def add(term: Callable[[int], Term]) -> Callable[[Fold, int], None]:
    def apply(state: Fold, row: int) -> None:
        state.terms[row] = (*state.terms[row], term(row))

    return apply


def skip(weight: Tensor | None) -> Callable[[Fold, int], None]:
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


def probabilities(fn: Probabilities) -> Callable[[Fold, int], None]:
    def apply(state: Fold, row: int) -> None:
        state.functions.setdefault(row, []).append(fn)

    return apply
