"""What an attention call is made of: terms, and where their tensors come from.

For each batch row, with per-query weights w_j,

    out = sum_j  w_j(query) * softmax(Q_j K_j^T * scale + bias_j) (L_j V_j)              (1)

A plain call is one term with its own q, k, v. Tensors are named, not copied: a `Ref` says which
row of which stacked tensor is meant, so that rows of the same form are gathered into one batched
evaluation when the sum is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from hookctl.attention.key_regions import KeyRegions
from hookctl.attention.query_lists import QueryLists, TextPlace
from hookctl.attention.token_map import ValueMap


class Ref(NamedTuple):
    """Row `row` of `base`, a stack [rows, sub-batch, heads, tokens, channels]."""

    base: Tensor
    row: int

    @property
    def tensor(self) -> Tensor:
        """[sub-batch, heads, tokens, channels]"""
        return self.base[self.row]


class Segment(NamedTuple):
    """A stretch of keys with their values.

    shift: added to the scores of these keys, [tokens] or a number; mask_row: row of the model's
    own mask that applies to them, None for keys that the model does not know; counts: whether the
    values reach the output, or the keys only take their share of the softmax.
    """

    k: Ref
    v: Ref
    shift: Tensor | float | None = None
    mask_row: int | None = None
    counts: bool = True

    @property
    def tokens(self) -> int:
        return self.k.base.shape[-2]


class Term(NamedTuple):
    """One summand of equation (1) for one row.

    The first segment holds the row's own tokens; value maps and read-outs speak of it.
    maps: applied to the values in this order; weight: a number, or per query [N]; factors: rank-r
    biases, pairs ([N, r], [M, r]) whose first is None for ones; value_only: the probabilities are
    the identity, so that the term is its values; extra: the term was added, over keys that are
    not the row's own.
    """

    q: Ref
    segments: tuple[Segment, ...]
    scale: float
    maps: tuple[ValueMap, ...] = ()
    weight: Tensor | float = 1.0
    factors: tuple[tuple[Tensor | None, Tensor], ...] = ()
    regions: KeyRegions | None = None
    value_only: bool = False
    extra: bool = False

    @property
    def own(self) -> Segment:
        return self.segments[0]

    @property
    def bare(self) -> bool:
        """Whether the term is softmax(q k^T scale) v of one row's tokens, and nothing else."""
        own, weight = self.segments[0], self.weight
        edited = self.maps or self.factors or self.regions is not None or self.value_only
        whole = not isinstance(weight, Tensor) and weight == 1.0 and len(self.segments) == 1
        return whole and not edited and own.shift is None and own.counts

    def with_own(self, *, q: Ref | None = None, **changes: Any) -> Term:
        """With changes of the first segment, and other queries if they are given."""
        segments = (self.own._replace(**changes), *self.segments[1:])
        return self._replace(q=q or self.q, segments=segments)

    def weighted(self, weight: Tensor | float) -> Term:
        return self._replace(weight=self.weight * weight)

    def signature(self) -> tuple[Any, ...]:
        """Terms of equal signature can be evaluated in one batch."""
        return (
            id(self.q.base),
            *[
                (id(s.k.base), id(s.v.base), _form(s.shift), s.mask_row is None, s.counts)
                for s in self.segments
            ],
            len(self.maps),
            _form(self.weight),
            *[(id(a), id(b)) for a, b in self.factors],
            id(self.regions),
            self.scale,
            self.value_only,
        )


def _form(value: Tensor | float | None) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


class Terms(dict[int, tuple[Term, ...]]):
    """The rewritten terms of rows; a row that nothing rewrote gives its plain term.

    q, k, v: the call's own, stacks [rows, sub-batch, heads, tokens, channels].
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        super().__init__()
        self._own = q, k, v, scale
        self._made: dict[int, tuple[Term, ...]] = {}

    def __missing__(self, row: int) -> tuple[Term, ...]:
        made = self._made.get(row)
        if made is None:
            q, k, v, scale = self._own
            own = Segment(Ref(k, row), Ref(v, row), None, row)
            made = self._made[row] = (Term(Ref(q, row), (own,), scale),)
        return made

    def snapshot(self) -> Terms:
        """A copy that does not follow later rewriting; plain terms are shared."""
        copy = Terms(*self._own)
        copy.update(self)
        copy._made = self._made
        return copy


@dataclass(frozen=True, eq=False)
class Divided:
    """What further texts add to a row, each for the queries that have a share in it.

    q: the queries, k, v: what the texts stand in, stacks [rows, sub-batch, heads, tokens,
    channels]; of each share: weights, [N], shifts of the scores, and where its text stands.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    lists: QueryLists
    weights: tuple[Tensor, ...]
    shifts: tuple[Tensor | None, ...]
    texts: tuple[TextPlace, ...]

    def terms(self, row: int) -> Iterator[Term]:
        """One for each share."""
        for weight, shift, text in zip(self.weights, self.shifts, self.texts, strict=True):
            at, tokens = row if text.row is None else text.row, slice(text.start, text.stop)
            k, v = (Ref(x[at : at + 1, ..., tokens, :], 0) for x in (self.k, self.v))
            own = Segment(k, v, shift)
            yield Term(Ref(self.q, row), (own,), self.scale, weight=weight, extra=True)


class Combination(NamedTuple):
    """Outputs of further terms of one row, which are weighed beside its own.

    terms: by name; weigh: outputs by name -> weights by name, to multiply them by; queries: (start,
    stop) of those that it is done for.
    """

    terms: Mapping[str, Term]
    weigh: Callable[[dict[str, Tensor]], Mapping[str, Tensor | float]]
    queries: tuple[int, int]


@dataclass(eq=False)
class Sum:
    """The terms of every row of one attention call, ready to be evaluated.

    terms: row -> its terms; rows: how many there are; mask: the model's own bias as a stack
    [rows | 1, sub-batch | 1, heads | 1, N | 1, M], additive or bool; functions: row -> what edits
    its probabilities themselves; divided: row -> what divisions add to it, as terms that an
    evaluator may have one by one (`spelled_out`); combined: row -> what is made of its output at
    the end, one after another.
    """

    terms: Terms
    rows: int
    mask: Tensor | None = None
    functions: dict[int, list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    divided: dict[int, list[Divided]] = field(default_factory=dict)
    combined: dict[int, list[Combination]] = field(default_factory=dict)

    def spelled_out(self, rows: Iterable[int] | None = None) -> Sum:
        """With the divisions of some rows, or of all, as terms of their own."""
        chosen = self.divided.keys() & (self.divided if rows is None else set(rows))
        if not chosen:
            return self
        terms = self.terms.snapshot()
        for row in chosen:
            added = [term for one in self.divided[row] for term in one.terms(row)]
            terms[row] = (*terms[row], *added)
        rest = {row: added for row, added in self.divided.items() if row not in chosen}
        return replace(self, terms=terms, divided=rest)

    @property
    def touched(self) -> set[int]:
        """The rows whose attention was rewritten."""
        return {*self.terms, *self.functions, *self.combined}

    def groups(self, rows: Iterable[int], *, copying: bool = False) -> list[list[int]]:
        """The rows sorted into groups that can be evaluated in one batch.

        Those that nothing rewrote are read where they lie, in runs of adjacent ones; copying: they
        may go with those that only take their tensors from other rows, where such are.
        """
        rows, groups = list(rows), dict[Any, list[int]]()
        forms = {
            row: tuple([term.signature() for term in self.terms[row]])
            for row in rows
            if row in self.terms
        }
        plain = [row for row in rows if row not in forms]
        if plain and copying:
            form = (self.terms[plain[0]][0].signature(),)
            if form in forms.values():
                forms |= dict.fromkeys(plain, form)
        run = -1
        for row in rows:
            if row in forms:
                key: Any = forms[row]
            else:
                run = run if groups.get(run, [None])[-1] == row - 1 else -1 - len(groups)
                key = run
            groups.setdefault(key, []).append(row)
        return list(groups.values())
