"""Terms over short keys with their probabilities formed once and used by every row.

Over 77 text tokens the matrix is thin (N x 77), and the source's probabilities serve the source's
edits at once: one softmax, several value tensors. On a CPU this beats one SDPA call per term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.attention.assemble import scores_of, values_of, weight_of
from hookctl.attention.term import Term


def evaluate(rows: Sequence[tuple[Term, ...]], mask: Tensor | None) -> list[Tensor]:
    """The sums of rows of terms, each [sub-batch, heads, N, channels].

    The rows may differ in form. Each distinct softmax is formed once, [sub-batch, heads, N, M]
    for M keys: use it where M is short.
    """
    formed = _probabilities([term for terms in rows for term in terms], mask)
    totals: list[Tensor | None] = [_merged(terms, formed) for terms in rows]
    left = [() if total is not None else terms for total, terms in zip(totals, rows, strict=True)]
    for batch in _batches(left, formed):
        terms = [term for _, term in batch]
        p, first = formed[_key(terms[0])]
        part = torch.matmul(p[first : first + len(batch)], values_of(terms))
        weight = weight_of(terms, part)
        if isinstance(weight, Tensor) or weight != 1.0:
            part = part * weight
        for (row, _), one in zip(batch, part, strict=True):
            total = totals[row]
            totals[row] = one if total is None else total + one
    return [total for total in totals if total is not None]


def _merged(
    terms: tuple[Term, ...], formed: dict[tuple[Any, ...], tuple[Tensor, int]]
) -> Tensor | None:
    """A row whose terms share their values: map and add the probabilities, multiply once.

    Cheaper than one product per term where values are wider than the keys are long.
    """
    first = terms[0].own.v
    if (
        len(terms) < 2
        or first.base.shape[-1] < first.base.shape[-2]
        or any(
            len(t.segments) > 1
            or t.own.v.base is not first.base
            or t.own.v.row != first.row
            or len(t.maps) > 1
            or isinstance(t.weight, Tensor)
            or any(m.start or m.matrix.shape[-1] != t.own.tokens for m in t.maps)
            for t in terms
        )
    ):
        return None
    total: Tensor | None = None
    for term in terms:
        stack, place = formed[_key(term)]
        p = stack[place]
        for value_map in term.maps:
            matrix = value_map.matrix.to(p)
            p = p * matrix if value_map.diagonal else p @ matrix
        p = p if term.weight == 1.0 else p * term.weight
        total = p if total is None else total + p
    return torch.matmul(total, first.tensor)  # type: ignore[arg-type]


def _key(term: Term) -> tuple[Any, ...]:
    """Terms of equal key have equal probabilities."""
    return (
        id(term.q.base),
        term.q.row,
        tuple(
            (id(s.k.base), s.k.row, s.mask_row, id(s.shift) if s.shift is not None else None)
            for s in term.segments
        ),
        tuple(id(keys) for _, keys in term.factors),
    )


def _form(term: Term) -> tuple[Any, ...]:
    """Terms of equal form can share one batched product."""
    segments = tuple((id(s.k.base), s.mask_row is None, s.shift is None) for s in term.segments)
    return (id(term.q.base), segments, tuple(id(keys) for _, keys in term.factors), term.scale)


def _probabilities(
    terms: list[Term], mask: Tensor | None
) -> dict[tuple[Any, ...], tuple[Tensor, int]]:
    """Key -> (stack of probabilities [unique, sub-batch, heads, N, M], place in it)."""
    unique: dict[tuple[Any, ...], dict[tuple[Any, ...], Term]] = {}
    for term in terms:
        unique.setdefault(_form(term), {}).setdefault(_key(term), term)
    formed = {}
    for group in unique.values():
        keys = sorted(group, key=lambda key: key[1])
        batch = scores_of([group[key] for key in keys], mask)
        q, k = batch.q.flatten(0, 2), batch.k.flatten(0, 2)
        if batch.bias is None:
            # beta=0: the first argument is never read, only its shape.
            scores = torch.baddbmm(
                q.new_empty(1, 1, 1).expand(q.shape[0], q.shape[1], k.shape[1]),
                q,
                k.mT,
                beta=0,
                alpha=batch.scale,
            ).unflatten(0, batch.q.shape[:3])
        else:
            scores = batch.q @ batch.k.mT * batch.scale + batch.bias.to(q.dtype)
        p = scores.softmax(-1)
        formed |= {key: (p, place) for place, key in enumerate(keys)}
    return formed


def _batches(
    rows: Sequence[tuple[Term, ...]], formed: dict[tuple[Any, ...], tuple[Tensor, int]]
) -> list[list[tuple[int, Term]]]:
    """(row, term) pairs in runs of equal signature whose probabilities lie side by side."""
    pairs = [(row, term) for row, terms in enumerate(rows) for term in terms]
    pairs.sort(key=lambda pair: (str(pair[1].signature()), formed[_key(pair[1])][1]))
    runs: list[list[tuple[int, Term]]] = []
    for pair in pairs:
        p, place = formed[_key(pair[1])]
        if runs:
            last = runs[-1][-1][1]
            q, before = formed[_key(last)]
            if q is p and place == before + 1 and last.signature() == pair[1].signature():
                runs[-1].append(pair)
                continue
        runs.append([pair])
    return runs
