"""What an attention call is made of: terms, and where their tensors come from.

For each batch row, with per-query weights w_j,

    out = sum_j  w_j(query) * softmax(Q_j K_j^T * scale + bias_j) (L_j V_j)              (1)

A plain call is one term with its own q, k, v. Tensors are named, not copied: a `Ref` says which
row of which stacked tensor is meant, so that rows of the same form are gathered into one batched
evaluation when the sum is finished.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ref:
    """Row `row` of `base`, a stack [rows, sub-batch, heads, tokens, channels]."""

    base: Tensor
    row: int

    @property
    def tensor(self) -> Tensor:
        """[sub-batch, heads, tokens, channels]"""
        return self.base[self.row]


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of keys with their values.

    shift: added to the scores of these keys, [tokens] or a number; mask_row: row of the model's
    own mask that applies to them, None for keys that the model does not know.
    """

    k: Ref
    v: Ref
    shift: Tensor | float | None = None
    mask_row: int | None = None

    @property
    def tokens(self) -> int:
        return self.k.base.shape[-2]


@dataclass(frozen=True, eq=False)
class ValueMap:
    """A linear map of the values along the token axis, folded out of the probabilities.

    matrix: [T, T] or its diagonal [T], applied to the tokens start .. start + T; rest: gain of
    the values of every other token of the segment.
    """

    matrix: Tensor
    start: int = 0
    rest: float = 1.0

    @property
    def diagonal(self) -> bool:
        return self.matrix.dim() == 1


@dataclass(frozen=True, eq=False)
class Regions:
    """Per-token bit sets: a query sees a key where `queries & keys` is not 0.

    queries: int64 [N]; keys: int64 [M]. A query that may see no key gives 0.
    """

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of equation (1) for one row.

    The first segment holds the row's own tokens; value maps and read-outs speak of it.
    weight: a number, or per query [N]; factors: rank-r biases, pairs ([N, r], [M, r]);
    value_only: the probabilities are the identity, so that the term is its values.
    """

    q: Ref
    segments: tuple[Segment, ...]
    scale: float
    maps: tuple[ValueMap, ...] = ()
    weight: Tensor | float = 1.0
    factors: tuple[tuple[Tensor, Tensor], ...] = ()
    regions: Regions | None = None
    value_only: bool = False

    @property
    def own(self) -> Segment:
        return self.segments[0]

    def with_own(self, **changes: Any) -> Term:
        return replace(self, segments=(replace(self.own, **changes), *self.segments[1:]))

    def weighted(self, weight: Tensor | float) -> Term:
        return replace(self, weight=self.weight * weight)

    def signature(self) -> tuple[Any, ...]:
        """Terms of equal signature can be evaluated in one batch."""
        return (
            id(self.q.base),
            tuple(
                (id(s.k.base), id(s.v.base), _form(s.shift), s.mask_row is None)
                for s in self.segments
            ),
            tuple((m.matrix.shape, m.start, m.rest) for m in self.maps),
            _form(self.weight),
            tuple((id(a), id(b)) for a, b in self.factors),
            None if self.regions is None else (id(self.regions.queries), id(self.regions.keys)),
            self.scale,
            self.value_only,
        )


def _form(value: Tensor | float | None) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


@dataclass(eq=False)
class Sum:
    """The terms of every row of one attention call, ready to be evaluated.

    terms: row -> its terms; touched: the rows whose terms were rewritten; mask: the model's own
    bias as a stack [rows | 1, sub-batch | 1, heads | 1, N | 1, M], additive or bool.
    """

    terms: dict[int, tuple[Term, ...]]
    touched: set[int] = field(default_factory=set)
    mask: Tensor | None = None

    def groups(self, rows: list[int]) -> list[list[int]]:
        """The rows sorted into groups that can be evaluated in one batch."""
        groups: dict[Any, list[int]] = {}
        for row in rows:
            key = tuple(term.signature() for term in self.terms[row])
            groups.setdefault(key, []).append(row)
        return list(groups.values())


def gather(refs: list[Ref]) -> Tensor:
    """The rows of one stack as a batch, [len(refs), sub-batch, heads, tokens, channels].

    Copies nothing if the rows are adjacent or all the same.
    """
    base, rows = refs[0].base, [ref.row for ref in refs]
    if len(rows) == 1 or all(b - a == 1 for a, b in zip(rows, rows[1:], strict=False)):
        return base[rows[0] : rows[-1] + 1]
    if all(row == rows[0] for row in rows):
        return base[rows[0] : rows[0] + 1].expand(len(rows), *base.shape[1:])
    return torch.stack([base[row] for row in rows])
