"""The rows of a finished sum as the arguments of one launch of the sum-of-terms kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.term import Segment, Sum, Term
from hookctl.evaluate.gather import segment_bias
from hookctl.evaluate.sdpa import Piece


def launch(finished: Sum, rows: Sequence[int]) -> Piece | None:
    """Some rows in one launch; None if they need more stacks than it takes."""
    from hookctl.kernels.sum_of_terms import STACKS, sum_of_terms

    form = _Arguments(finished.mask)
    for i, row in enumerate(rows):
        for term in finished.terms[row]:
            form.add(i, term)
    scales = {term.scale for row in rows for term in finished.terms[row]}
    stacks = q, k, v = form.stacks("q"), form.stacks("k"), form.stacks("v")
    if len(scales) > 1 or any(len(x) > STACKS for x in stacks):
        return None
    terms = [_numbered(stretch, stacks) for stretch in form.stretches]
    out, _ = sum_of_terms(
        q,
        k,
        v,
        terms,
        scales.pop(),
        weights=torch.stack(form.weights) if form.weights else None,
        bias=form.bias() if form.biases else None,
        factors=form.factor_stacks() if form.factors else None,
    )
    return list(rows), out


def _numbered(stretch: dict[str, Any], stacks: Sequence[list[Tensor]]) -> Any:
    """Rows counted through the stacks one after the other."""
    from hookctl.kernels.sum_of_terms import Stretch

    found = dict(stretch)
    for kind, of_kind in zip("qkv", stacks, strict=True):
        stack, row = found[kind]
        found[kind] = sum(x.shape[0] for x in of_kind[:stack]) + row
    return Stretch(**found)


@dataclass
class _Arguments:
    """What one launch is given, as it is collected term by term."""

    mask: Tensor | None
    stretches: list[dict[str, Any]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    factors: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    # Per kind: stacks as they are, or lists of rows that are yet to be stacked.
    _bases: dict[str, list[Any]] = field(default_factory=lambda: {kind: [] for kind in "qkv"})

    def add(self, row: int, term: Term) -> None:
        q = self._base("q", term.q.base), term.q.row
        for segment in term.segments:
            shift = segment.shift if isinstance(segment.shift, float | int) else 0.0
            of_mask = self.mask is not None and segment.mask_row is not None
            bias = of_mask or isinstance(segment.shift, Tensor)
            stretch = {
                "row": row,
                "q": q,
                "k": (self._base("k", segment.k.base), segment.k.row),
                "v": self._values(term, segment),
                "shift": 0.0 if bias else float(shift),
                "bias": self._bias(segment) if bias else -1,
                "closes": False,
            }
            if segment is term.own and term.factors:
                stretch["factors"] = self._factors(term)
            self.stretches.append(stretch)
        last = self.stretches[-1]
        last["closes"] = True
        if isinstance(term.weight, Tensor):
            last["weights"] = len(self.weights)
            self.weights.append(term.weight.float().expand(term.q.base.shape[-2]))
        else:
            last["weight"] = float(term.weight)

    def stacks(self, kind: str) -> list[Tensor]:
        found = self._bases[kind]
        return [torch.stack(x) if isinstance(x, list) else x for x in found]

    def bias(self) -> Tensor:
        """[B, sub-batch | 1, heads | 1, M], padded to the longest."""
        keys = max(x.shape[-1] for x in self.biases)
        padded = [F.pad(x, (0, keys - x.shape[-1])) for x in self.biases]
        return torch.stack(torch.broadcast_tensors(*padded))

    def factor_stacks(self) -> tuple[Tensor, Tensor]:
        """[F, N, r] and [F, M, r], padded to the largest."""
        pairs = list(self.factors.values())
        rank, keys = (max(k.shape[i] for _, k in pairs) for i in (1, 0))
        of_queries = [F.pad(q, (0, rank - q.shape[1])) for q, _ in pairs]
        of_keys = [F.pad(k, (0, rank - k.shape[1], 0, keys - k.shape[0])) for _, k in pairs]
        return torch.stack(of_queries), torch.stack(of_keys)

    def _base(self, kind: str, base: Tensor) -> int:
        bases = self._bases[kind]
        for i, known in enumerate(bases):
            if known is base:
                return i
        bases.append(base)
        return len(bases) - 1

    def _made(self, value: Tensor) -> tuple[int, int]:
        """A place among the values that were made here, one stack for each length."""
        bases = self._bases["v"]
        for i, known in enumerate(bases):
            if isinstance(known, list) and known[0].shape == value.shape:
                known.append(value)
                return i, len(known) - 1
        bases.append([value])
        return len(bases) - 1, 0

    def _values(self, term: Term, segment: Segment) -> tuple[int, int]:
        if not segment.counts:
            return self._made(torch.zeros_like(segment.v.tensor))
        if segment is not term.own or not term.maps:
            return self._base("v", segment.v.base), segment.v.row
        value = segment.v.tensor
        for value_map in term.maps:
            value = value_map.apply(value)
        return self._made(value)

    def _bias(self, segment: Segment) -> int:
        found = segment_bias([segment], self.mask)
        assert found is not None  # the segment has a mask or a shift
        self.biases.append(found[0, ..., 0, :].float().expand(-1, -1, segment.tokens))
        return len(self.biases) - 1

    def _factors(self, term: Term) -> int:
        keys_of = term.own.tokens
        key = (keys_of, *map(id, term.factors))
        if key not in self.factors:
            pairs = term.factors
            n = term.q.base.shape[-2]
            queries = [keys.new_ones(n, 1) if q is None else q for q, keys in pairs]
            of_keys = [F.pad(keys, (0, 0, 0, keys_of - keys.shape[0])) for _, keys in pairs]
            self.factors[key] = torch.cat(queries, 1), torch.cat(of_keys, 1)
        return list(self.factors).index(key)
