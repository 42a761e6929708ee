"""What the verbs of `AttentionCall` do to terms, once all editors have spoken.

Each operation rewrites the terms of its rows. They are folded stage by stage, so that editors
compose in whatever order they spoke; inside a stage they are folded in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
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


class Rewriting(NamedTuple):
    """What a verb does to the terms of a row, and what tells it from others of that verb.

    alike: equal for rewritings that differ in tensors alone, None if it can't be told; given: those
    that `apply` takes as they are, so that others may stand for them; constants: those whose values
    were looked at beforehand, so that they must be the same and unchanged.
    """

    apply: Callable[[Fold, int], None]
    alike: Hashable = None
    given: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()


class Operation(NamedTuple):
    """One use of a verb by one editor."""

    stage: Stage
    editor: Any
    verb: str
    rows: tuple[int, ...]
    apply: Callable[[Fold, int], None]
    alike: Hashable = None
    given: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()


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


def borrow(sources: dict[str, Ref], mask_row: int | None, weight: Tensor | None) -> Rewriting:
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

    alike = (*((name, ref.row) for name, ref in sources.items()), mask_row)
    stacks = tuple(ref.base for ref in sources.values())
    return Rewriting(apply, alike, stacks if weight is None else (*stacks, weight))


def replace_own(refs: dict[str, dict[int, Ref]]) -> Rewriting:
    """refs: for some of q, k, v, what each row has instead of its own."""

    def apply(state: Fold, row: int) -> None:
        q = refs["q"][row] if "q" in refs else None
        changes = {name: by_row[row] for name, by_row in refs.items() if name != "q"}
        state.terms[row] = tuple(t.with_own(q=q, **changes) for t in state.terms[row])

    placed = [(name, row, ref) for name, of_row in refs.items() for row, ref in of_row.items()]
    alike = tuple((name, row, ref.row) for name, row, ref in placed)
    return Rewriting(apply, alike, tuple(ref.base for _, _, ref in placed))


def extend(segment: Segment, share: float = 1.0) -> Rewriting:
    """share: weight of the extended form beside the own one."""

    def one(term: Term) -> tuple[Term, ...]:
        extended = term._replace(segments=(*term.segments, segment))
        if share == 1.0:
            return (extended,)
        return extended.weighted(share), term.weighted(1.0 - share)

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(part for term in state.terms[row] for part in one(term))

    k, v, shift, mask_row, _ = segment
    alike = (k.row, v.row, mask_row, share)
    if isinstance(shift, Tensor):
        return Rewriting(apply, alike, (k.base, v.base, shift))
    return Rewriting(apply, (*alike, shift), (k.base, v.base))


def restrict(regions: Regions) -> Rewriting:
    def one(term: Term) -> Term:
        allowed = regions.extended(sum(s.tokens for s in term.segments[1:]))
        return term._replace(regions=term.regions.both(allowed) if term.regions else allowed)

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(one(t) for t in state.terms[row])

    return Rewriting(apply, regions)


def bias(queries: Tensor | None, keys: Tensor) -> Rewriting:
    """queries: [N, r] or None for ones; keys: [M, r] or [M]."""
    of_keys = keys if keys.dim() == 2 else keys[:, None]
    if queries is None and of_keys.shape[1] > 1:
        of_keys = of_keys.sum(1, keepdim=True)
    pair = (queries, of_keys)

    def apply(state: Fold, row: int) -> None:
        state.terms[row] = tuple(t._replace(factors=(*t.factors, pair)) for t in state.terms[row])

    return Rewriting(apply, (), (of_keys,) if queries is None else (queries, of_keys))


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

    matrices = tuple(x.matrix for x in (from_source, from_own) if x is not None)
    alike = (origin, from_source, from_own, vanishes, stays, queries is None)
    return Rewriting(apply, alike, (), matrices)


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

    return Rewriting(apply)


def add(q: Tensor, segment: Segment, scale: float, weight: float, mask: Tensor | None) -> Rewriting:
    """A softmax of its own of the model's queries q over a segment; mask: [N]."""
    gain = weight if mask is None else mask * weight

    def apply(state: Fold, row: int) -> None:
        term = Term(Ref(q, row), (segment,), scale, weight=gain, extra=True)
        state.terms[row] = (*state.terms[row], term)

    k, v = segment.k, segment.v
    if isinstance(gain, Tensor):
        return Rewriting(apply, (k.row, v.row), (k.base, v.base, gain))
    return Rewriting(apply, (k.row, v.row, gain), (k.base, v.base))


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

    return Rewriting(apply, (), () if weight is None else (weight,))


def probabilities(fn: Probabilities) -> Rewriting:
    def apply(state: Fold, row: int) -> None:
        state.functions.setdefault(row, []).append(fn)

    return Rewriting(apply)
