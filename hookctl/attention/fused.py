"""Terms by one fused kernel: the rows of a finished sum are named to it, and nothing is gathered.

Rows of equal probabilities and regions have kernels of their own (`together`). Dense masks over
queries and keys, identity attention, learned biases and terms of more stacks than one launch takes
are left to SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention import sdpa, together
from hookctl.attention.assemble import segment_bias
from hookctl.attention.sdpa import Piece
from hookctl.attention.term import Segment, Sum, Term
from hookctl.kernels.common.guard import usable
from hookctl.kernels.common.launch import DTYPES, WIDEST, in_one_grid, interpreting
from hookctl.kernels.common.launch_tables import SHORT, learns_ranked, short_form
from hookctl.kernels.common.wins import TERMS, wins

if TYPE_CHECKING:
    from hookctl.attention.call import AttentionCall

_HALVES = (torch.float16, torch.bfloat16)


def missing() -> str | None:
    """Why the kernels can't run here at all; None if they can."""
    return usable("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")


def suits(call: AttentionCall, finished: Sum) -> str | None:
    """Why a call is faster in one launch; None where SDPA stays."""
    q = call.q
    if q.device.type != "cuda" or q.dtype not in _HALVES or usable(q.device):
        return None
    if not in_one_grid(q):  # many frames or places, each a sequence of its own
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, call.k, call.v)):
        return None
    most, keys = max((len(terms) for terms in finished.terms.values()), default=0), call.k.shape[-2]
    if (
        wins(TERMS, q.device, most, q.shape[-2])
        # Longer keys, whose softmax no form holds whole, are better off with SDPA's own kernels.
        and short_form(q, keys)
        and all(_fits(t, finished.mask) for ts in finished.terms.values() for t in ts)
    ):
        return f"{most} terms over {keys} keys: one launch writes the output once"
    return together.suits(call, finished)


def evaluate(finished: Sum, rows: Sequence[int]) -> list[Piece]:
    """The sums of some rows, in pieces [rows, sub-batch, heads, N, channels]."""
    mask = finished.mask
    fit = [row for row in rows if all(_fits(t, mask) for t in finished.terms[row])]
    rest = [row for row in rows if row not in fit]
    pieces, fit = together.shared(finished, fit)
    # Over long keys a row that nothing rewrote is as fast by the model's own means as by any.
    long = [r for r in fit if r not in finished.terms and _keys(finished, r) > max(SHORT)]
    fit = [row for row in fit if row not in long]
    pieces += sdpa.evaluate(finished, rest + long, together.attend) if rest or long else []
    whole = _launch(finished, fit) if fit else None
    if whole:
        return [*pieces, whole]
    for group in finished.groups(fit):
        piece = _launch(finished, group)
        pieces += [piece] if piece else sdpa.evaluate(finished, group)
    return pieces


def _keys(finished: Sum, row: int) -> int:
    return finished.terms[row][0].own.tokens


def _fits(term: Term, mask: Tensor | None) -> bool:
    """Whether the kernel can express a term."""
    q, own = term.q.base, term.own
    bare = not term.value_only and term.regions is None
    if not bare or q.dtype not in DTYPES or not in_one_grid(q):
        return False
    of_queries = mask is not None and mask.shape[-2] > 1
    if of_queries and any(s.mask_row is not None for s in term.segments):
        return False
    constants = [x for pair in term.factors for x in pair if x is not None]
    constants += [s.shift for s in term.segments if isinstance(s.shift, Tensor)]
    constants += [] if mask is None else [mask]
    if any(x.requires_grad for x in constants) or q.shape[-1] > WIDEST:
        return False
    stacks = [x.base for s in term.segments for x in (s.k, s.v)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *stacks))
    if term.factors and learns and not learns_ranked(q):
        return False
    alike = all(x.shape[-1] == q.shape[-1] and x.dtype == q.dtype for x in stacks)
    return alike and all(keys.shape[0] <= own.tokens for _, keys in term.factors)


def _launch(finished: Sum, rows: Sequence[int]) -> Piece | None:
    """Some rows in one launch; None if they need more stacks than it takes."""
    from hookctl.kernels.sum_of_terms import STACKS, sum_of_terms

    form = _Form(finished.mask)
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
class _Form:
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
