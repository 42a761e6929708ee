"""Outputs of further terms beside a row's own, and what an editor makes of them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hookctl.attention.combination import OWN
from hookctl.attention.term import Combination, Sum
from hookctl.evaluate.sdpa import Piece

Evaluate = Callable[[Sum, Sequence[int]], list[Piece]]


def combined(out: Tensor, finished: Sum, evaluate: Evaluate) -> Tensor:
    """The output of a call, [rows, sub-batch, heads, N, channels], where rows combine several.

    evaluate: what evaluated the call; all further terms are handed to it at once, as the rows of a
    sum of their own.
    """
    terms = finished.terms.snapshot()
    terms.clear()
    for several in finished.combined.values():
        for one in several:
            for term in one.terms.values():
                terms[len(terms)] = (term,)
    parts = _by_row(evaluate(Sum(terms, len(terms), finished.mask), range(len(terms))))
    rows, place = list(out.unbind(0)), 0
    for row, several in finished.combined.items():
        for one in several:
            start, stop = one.queries
            whole = rows[row]
            outputs = {OWN: whole[..., start:stop, :]}
            for name in one.terms:
                outputs[name] = parts[place][..., start:stop, :]
                place += 1
            new = [whole[..., :start, :], _weighed(one, outputs), whole[..., stop:, :]]
            rows[row] = torch.cat(new, -2)
    # Tokens before heads, so that merging the heads afterwards copies nothing.
    return torch.stack([row.transpose(1, 2) for row in rows]).transpose(2, 3)


def _by_row(pieces: Sequence[Piece]) -> dict[int, Tensor]:
    return {row: one for rows, part in pieces for row, one in zip(rows, part, strict=True)}


def _weighed(one: Combination, outputs: dict[str, Tensor]) -> Tensor:
    """[sub-batch, heads, queries, channels]"""
    own = outputs[OWN]
    fine = torch.promote_types(own.dtype, torch.float32)
    total = torch.zeros_like(own, dtype=fine)
    for name, weight in one.weigh(outputs).items():
        total = total + outputs[name].to(fine) * (
            weight.to(total) if isinstance(weight, Tensor) else weight
        )
    return total.to(own.dtype)
