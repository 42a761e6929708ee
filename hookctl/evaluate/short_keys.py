"""Terms over short keys with their probabilities formed once and used by every row.

The source's probabilities serve the source's edits at once: one softmax, several value tensors.
Values that a token map gives no weight are not multiplied. Keys that many rows attend to, as an
adapter's, meet the queries of all of them at once; otherwise rows are taken one at a time, so that
q, k and v are read where they lie. On a CPU this beats one SDPA call per term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hookctl.attention.arguments import positions
from hookctl.attention.term import Ref, Sum, Term
from hookctl.evaluate.gather import factors_bias, key_bias, values_of, weigh
from hookctl.evaluate.sdpa import Piece, one_hot_values

# Probabilities that a thread makes at a time, for its core's own cache to hold. Measured on a CPU:
# half or twice as many cost the same; of 4096 queries, all at once cost 5 to 20 % more.
_BLOCK = 2**18


class Use(NamedTuple):
    """What probabilities P are for: total = beta * total + weight * P V, in place.

    total: gives [batch, N, channels] when it is written to (autograd knows no view that was taken
    before another one of the same tensor was written to); values: V, [batch, keys, channels]; keys:
    those of P that have values, None for all; weight: a number, or [N].
    """

    total: Callable[[], Tensor]
    beta: float
    values: Tensor
    keys: slice | None
    weight: Tensor | float

    def add(self, p: Tensor, block: slice | None) -> None:
        """p: the probabilities of a block of queries (None: of all), [batch, queries, M]."""
        weight = self.weight
        if self.keys is not None:
            p = p[..., self.keys]
        if isinstance(weight, Tensor):
            p, weight = p * _some(weight, block)[:, None], 1.0
        total = self.total() if block is None else self.total()[:, block]
        total.baddbmm_(p, self.values, beta=self.beta, alpha=weight)


class Softmax:
    """The probabilities of a term whose queries and keys are q and k, [batch, tokens, channels],
    under the model's mask; batch: sub-batch * heads."""

    def __init__(self, q: Tensor, k: Tensor, term: Term, mask: Tensor | None) -> None:
        self._q, self._k, self._term = q, k.mT, term
        self._unread = _unread(q)
        self._bias: Tensor | None = None
        bare = mask is None and all(s.shift is None for s in term.segments)
        bias = None if bare else key_bias([term], mask)
        if bias is not None:
            self._empty = (bias == float("-inf")).all(-1, keepdim=True)[0]
            self._bias = bias[0].to(q.dtype).masked_fill(self._empty, 0.0)

    def blocks(self) -> Iterator[tuple[slice | None, Tensor]]:
        """Blocks of queries (None: all of them) with their probabilities, [batch, queries, M]; of a
        query without any allowed key they are 0."""
        batch, queries, _ = self._q.shape
        at_once = _BLOCK * torch.get_num_threads()
        count = max(-(-batch * queries * self._k.shape[-1] // at_once), 1)
        size = -(-queries // count)
        if count == 1:
            yield None, self._of(None)
            return
        for start in range(0, queries, size):
            block = slice(start, min(start + size, queries))
            yield block, self._of(block)

    def _of(self, block: slice | None) -> Tensor:
        q, term = self._q, self._term
        if block is not None:
            q = q[:, block]
        scores = torch.baddbmm(self._unread, q, self._k, beta=0, alpha=term.scale)
        if term.factors:
            factors = [(x if x is None else _some(x, block), keys) for x, keys in term.factors]
            scores = scores + factors_bias(term._replace(factors=tuple(factors)))
        if self._bias is None:
            return scores.softmax(-1)
        bias, empty = (_some(x, block, -2) for x in (self._bias, self._empty))
        scores = scores.unflatten(0, term.q.base.shape[1:3]) + bias
        return scores.softmax(-1).masked_fill(empty, 0.0).flatten(0, 1)


def _some(x: Tensor, block: slice | None, dim: int = 0) -> Tensor:
    """A block of the queries along a dimension, which may stand for all of them by 1."""
    if block is None or x.shape[dim] == 1:
        return x
    return x.narrow(dim, block.start, block.stop - block.start)


_zero: dict[torch.dtype, Tensor] = {}


def _unread(like: Tensor) -> Tensor:
    """The first argument of baddbmm, which it never reads if beta is 0."""
    if like.device.type != "cpu":
        return like.new_zeros(())
    if like.dtype not in _zero:
        with torch.inference_mode(False):  # a later call may be learned through
            _zero[like.dtype] = torch.zeros((), dtype=like.dtype)
    return _zero[like.dtype]


class _Placed(NamedTuple):
    """A term, and the place of its row in the output."""

    place: int
    term: Term


def evaluate(finished: Sum, rows: Sequence[int]) -> list[Piece]:
    """The sums of some rows, in one piece [rows, sub-batch, heads, N, channels].

    Each distinct softmax is formed once, [sub-batch * heads, N, M] for M keys: use it where M is
    short.
    """
    out = _unwritten(finished.terms[rows[0]][0], len(rows))
    totals, flat = _Totals(out), _Flat()
    alone, together = _sorted(finished, rows)
    for same in alone:
        term = same[0].term
        uses = [Use(*totals.row(place), *_values(t, flat), t.weight) for place, t in same]
        _put(_softmax(term, finished.mask, flat), uses)
    for run in together:
        (place, term), count = run[0], len(run)
        use = Use(*totals.rows(place, count), *_values(term, flat), term.weight)
        q = _as_one(term.q.base, term.q.row, count)
        _put(Softmax(q, _keys(term, flat), term, None), [use])
    return [(list(rows), out)]


def columns(finished: Sum, row: int, tokens: tuple[int, ...]) -> Tensor:
    """The edited probabilities of some of the row's own keys, [sub-batch, heads, N, t]."""
    flat = _Flat()
    parts = [_columns(t, finished.mask, tokens, flat) for t in finished.terms[row] if not t.extra]
    total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return total.unflatten(0, finished.terms[row][0].q.base.shape[1:3])


def _put(softmax: Softmax, uses: Sequence[Use]) -> None:
    for block, p in softmax.blocks():
        for use in uses:
            use.add(p, block)


def _columns(term: Term, mask: Tensor | None, tokens: tuple[int, ...], flat: _Flat) -> Tensor:
    """Of one term, weighted: [sub-batch * heads, N, t]."""
    softmax = _softmax(term, mask, flat)
    if term.maps:
        values = one_hot_values(term, tokens, term.q.base)
        parts = [p @ values for _, p in softmax.blocks()]
    else:
        place = positions(tokens, term.q.base.device)
        parts = [p.index_select(-1, place) for _, p in softmax.blocks()]
    found = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return weigh(found, term.weight[:, None] if isinstance(term.weight, Tensor) else term.weight)


def _softmax(term: Term, mask: Tensor | None, flat: _Flat) -> Softmax:
    return Softmax(flat.row(term.q), _keys(term, flat), term, mask)


def _sorted(finished: Sum, rows: Sequence[int]) -> tuple[list[list[_Placed]], list[list[_Placed]]]:
    """The terms that have equal probabilities, and those of adjacent rows that have all but their
    queries in common."""
    mask = finished.mask
    equal: dict[Any, list[_Placed]] = {}
    for place, row in enumerate(rows):
        for term in finished.terms[row]:
            key = (id(term.q.base), term.q.row, _probabilities_of(term, mask))
            equal.setdefault(key, []).append(_Placed(place, term))
    alone: list[list[_Placed]] = []
    like: dict[Any, list[_Placed]] = {}
    for same in equal.values():
        place, term = same[0]
        if len(same) > 1 or not _rows_are_one(term, mask):
            alone.append(same)
        else:
            stack = id(term.q.base), term.q.row - place
            rest = _probabilities_of(term, mask), _use_of(term)
            like.setdefault((stack, rest), []).append(same[0])
    runs = [run for placed in like.values() for run in _adjacent(placed)]
    alone += [run for run in runs if len(run) == 1]
    return alone, [run for run in runs if len(run) > 1]


def _adjacent(placed: Iterable[_Placed]) -> Iterator[list[_Placed]]:
    """Stretches of terms whose places follow each other."""
    run: list[_Placed] = []
    for one in placed:
        if run and one.place != run[-1].place + 1:
            yield run
            run = []
        run.append(one)
    yield run


def _probabilities_of(term: Term, mask: Tensor | None) -> tuple[Any, ...]:
    """What the probabilities of a term are made of, but for its queries."""
    masked = mask is not None
    segments = [(id(s.k.base), s.k.row, masked and s.mask_row, id(s.shift)) for s in term.segments]
    return (*segments, *map(id, term.factors), term.scale)


def _use_of(term: Term) -> tuple[Any, ...]:
    """What the probabilities of a term are put to."""
    values = [(id(s.v.base), s.v.row, s.counts) for s in term.segments]
    return (*values, *map(id, term.maps), term.weight)


def _rows_are_one(term: Term, mask: Tensor | None) -> bool:
    """Whether adjacent rows like this one are, without a copy, one row of many queries, and
    nothing but q tells the queries apart."""
    q = term.q.base
    return (
        not isinstance(term.weight, Tensor)
        and not term.factors
        and (mask is None or all(s.mask_row is None for s in term.segments))
        and q.shape[1] == 1
        and q.stride(0) == q.stride(-2) * q.shape[-2]
    )


def _as_one(stack: Tensor, row: int, count: int) -> Tensor:
    """Adjacent rows of a stack as [heads, count * tokens, channels]."""
    return stack[row : row + count, 0].transpose(1, 2).flatten(0, 1).transpose(0, 1)


class _Totals:
    """The rows of the output, [rows, sub-batch, heads, N, channels], and which of them hold a part
    of their sums."""

    def __init__(self, out: Tensor) -> None:
        self._out, self._rows = out, out.flatten(1, 2)
        self._begun: set[int] = set()

    def row(self, place: int) -> tuple[Callable[[], Tensor], float]:
        """[sub-batch * heads, N, channels], and the weight of what is there."""
        begun = place in self._begun
        self._begun.add(place)
        return lambda: self._rows[place], float(begun)

    def rows(self, place: int, count: int) -> tuple[Callable[[], Tensor], float]:
        """Adjacent rows, [heads, count * N, channels], and the weight of what is there."""
        places = set(range(place, place + count))
        begun = bool(places & self._begun)
        if begun:
            for other in places - self._begun:
                self._rows[other].zero_()
        self._begun |= places
        return lambda: _as_one(self._out, place, count), float(begun)


class _Flat:
    """The rows of stacks as [sub-batch * heads, tokens, channels]."""

    def __init__(self) -> None:
        self._rows: dict[int, Sequence[Tensor]] = {}

    def row(self, ref: Ref) -> Tensor:
        base = ref.base
        if base.shape[1] != 1:
            return base[ref.row].flatten(0, 1)  # a copy, which lives no longer than it must
        if id(base) not in self._rows:
            self._rows[id(base)] = base.squeeze(1).unbind(0)
        return self._rows[id(base)][ref.row]


def _unwritten(like: Term, rows: int) -> Tensor:
    """[rows, sub-batch, heads, N, channels], never read before it is written."""
    q = like.q.base
    _, sub, heads, tokens, _ = q.shape
    channels = like.own.v.base.shape[-1]
    if sub > 1:
        return q.new_empty(rows, sub, heads, tokens, channels)
    # Tokens before heads: merging the heads afterwards copies nothing.
    return q.new_empty(rows, sub, tokens, heads, channels).transpose(2, 3)


def _keys(term: Term, flat: _Flat) -> Tensor:
    keys = [flat.row(s.k) for s in term.segments]
    return keys[0] if len(keys) == 1 else torch.cat(keys, -2)


def _values(term: Term, flat: _Flat) -> tuple[Tensor, slice | None]:
    """The values of a term, mapped, and the keys that they are of (None: all)."""
    maps, (own, *rest) = term.maps, term.segments
    if not maps and not rest:
        return flat.row(own.v), None
    tokens = own.tokens
    if len(maps) == 1 and not rest and maps[0].covers(tokens):
        used = maps[0].used
        keys = slice(*used) if used is not None and used != (0, tokens) else None
        return maps[0].apply_used(flat.row(own.v)), keys
    return values_of([term])[0].flatten(0, 1), None
