"""Probabilities over short keys, formed for a block of queries at a time and put to their uses.

Of many queries only a block is at work: the matrix is never in memory as a whole, and what a cache
holds is used before it leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hookctl.attention.term import Term
from hookctl.evaluate.gather import factors_bias, gather, key_bias, values_of, weigh

# Probabilities that a thread makes at a time, for its core's own cache to hold. Measured on a CPU:
# half or twice as many cost the same; of 4096 queries, all at once cost 5 to 20 % more.
_BLOCK = 2**18


class Use(NamedTuple):
    """A term whose probabilities add to the output of a row; place: of the row in the output."""

    place: int
    term: Term

    @property
    def plain(self) -> bool:
        """Whether the row's values are taken as they are."""
        term = self.term
        bare = not term.maps and len(term.segments) == 1
        return bare and not isinstance(term.weight, Tensor) and term.weight == 1.0


class Read(NamedTuple):
    """A map that is read of probabilities: columns of P, mapped and weighted as the term is.

    into: blocks of [batch, queries, tokens] of the summands of a request, in order.
    """

    tokens: Tensor
    values: Tensor | None  # one-hot values [M, tokens] where the term has a token map
    weight: Tensor | float
    into: list[Tensor]


@dataclass(eq=False)
class Softmax:
    """Probabilities, by a term that has them, and what they are needed for."""

    term: Term
    uses: list[Use] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


def evaluate_batch(
    batch: Sequence[Softmax], mask: Tensor | None, out: Tensor | None, written: set[int]
) -> None:
    """Make the probabilities of like softmaxes, block by block, and put them to their uses.

    written: places of the output that hold a part of their sums.
    """
    terms = [softmax.term for softmax in batch]
    term = terms[0]
    q = gather([t.q for t in terms]).flatten(0, 2)
    keys = [
        gather([t.segments[i].k for t in terms]).flatten(0, 2) for i in range(len(term.segments))
    ]
    k = (keys[0] if len(keys) == 1 else torch.cat(keys, -2)).mT
    bare = mask is None and all(s.shift is None for s in term.segments)
    bias, empty = (None, None) if bare else _bias(terms, mask, q)
    count = len(q) // len(batch)
    ahead = _ahead(batch, written)
    sums = [] if out is None else _sums(batch, ahead, written)
    for block in _blocks(len(q) * q.shape[1] * k.shape[-1], q.shape[1]):
        scores = torch.baddbmm(_unread(q), _some(q, block, 1), k, beta=0, alpha=term.scale)
        if term.factors:
            pairs = [(x if x is None else _some(x, block, 0), y) for x, y in term.factors]
            scores = scores + factors_bias(term._replace(factors=tuple(pairs)))
        if bias is None or empty is None:
            p = scores.softmax(-1)
        else:
            scores = scores.unflatten(0, (len(batch), -1)) + _some(bias, block, -2)
            p = scores.softmax(-1).masked_fill(_some(empty, block, -2), 0.0).flatten(0, 1)
        if ahead and out is not None:
            _put_ahead(batch[:ahead], p[: ahead * count], block, out)
        for i, softmax in enumerate(batch):
            own = p if len(batch) == 1 else p[i * count : (i + 1) * count]
            if out is not None:
                for one in sums[i]:
                    _add(one, own, block, out)
            for read in softmax.reads:
                _read(read, own, block)


class _Summand(NamedTuple):
    """total = beta * total + weight * P V at a place of the output.

    values: V, [batch, keys, channels], and the keys of P that they are of (None: all); weight: a
    number, or [N].
    """

    place: int
    beta: float
    values: Tensor
    keys: slice | None
    weight: Tensor | float


def _sums(batch: Sequence[Softmax], ahead: int, written: set[int]) -> list[list[_Summand]]:
    """What each softmax adds to the output, but for the first uses of those that go ahead.

    written: places that hold something already; those of the batch are added.
    """
    sums: list[list[_Summand]] = []
    written.update(softmax.uses[0].place for softmax in batch[:ahead])
    for i, softmax in enumerate(batch):
        sums.append([])
        for place, term in softmax.uses[i < ahead :]:
            summand = _Summand(place, float(place in written), *_values(term), term.weight)
            sums[-1].append(summand)
            written.add(place)
    return sums


def _ahead(batch: Sequence[Softmax], written: set[int]) -> int:
    """How many softmaxes at the front give adjacent rows their own values as they are: one product
    makes the outputs of all of them. 0 for fewer than two."""
    count = 0
    for softmax in batch:
        use = softmax.uses[0] if softmax.uses else None
        if use is None or not use.plain or use.place in written:
            break
        first, v, own = batch[0].uses[0], use.term.own.v, batch[0].uses[0].term.own.v
        if v.base is not own.base or (use.place, v.row) != (first.place + count, own.row + count):
            break
        count += 1
    return count if count > 1 else 0


def _put_ahead(batch: Sequence[Softmax], p: Tensor, block: slice | None, out: Tensor) -> None:
    """p: the probabilities of a block of queries, [softmaxes * batch, queries, M]."""
    v = gather([softmax.uses[0].term.own.v for softmax in batch])
    place = batch[0].uses[0].place
    total = _some(out[place : place + len(batch)], block, 3)
    total.copy_(torch.bmm(p, v.flatten(0, 2)).unflatten(0, v.shape[:3]))


def _add(one: _Summand, p: Tensor, block: slice | None, out: Tensor) -> None:
    """p: the probabilities of a block of queries, [batch, queries, M]."""
    weight = one.weight
    if one.keys is not None:
        p = p[..., one.keys]
    if isinstance(weight, Tensor):
        p, weight = p * _some(weight, block, 0)[:, None], 1.0
    # A view of now: autograd knows none from before another one was written to.
    row = out[one.place]
    total = _some(row[0] if len(row) == 1 else row.flatten(0, 1), block, 1)
    total.baddbmm_(p, one.values, beta=one.beta, alpha=weight)


def _read(read: Read, p: Tensor, block: slice | None) -> None:
    found = p.index_select(-1, read.tokens) if read.values is None else p @ read.values
    weight = read.weight
    read.into.append(
        weigh(found, _some(weight, block, 0)[:, None] if isinstance(weight, Tensor) else weight)
    )


def _bias(
    terms: Sequence[Term], mask: Tensor | None, q: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What is added to the scores, [softmaxes | 1, batch | 1, N | 1, M], and which queries see no
    key: their probabilities are 0."""
    bias = key_bias(terms, mask)
    if bias is None:
        return None, None
    _, sub, heads, _, _ = terms[0].q.base.shape
    bias = bias.expand(bias.shape[0], sub, heads, *bias.shape[3:]).flatten(1, 2)
    empty = (bias == float("-inf")).all(-1, keepdim=True)
    return bias.to(q.dtype).masked_fill(empty, 0.0), empty


def at_once() -> int:
    return _BLOCK * torch.get_num_threads()


def _blocks(probabilities: int, queries: int) -> Iterator[slice | None]:
    """Blocks of queries; None for all of them."""
    count = max(-(-probabilities // at_once()), 1)
    if count == 1:
        yield None
        return
    size = -(-queries // count)
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


def _some(x: Tensor, block: slice | None, dim: int) -> Tensor:
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


def _values(term: Term) -> tuple[Tensor, slice | None]:
    """The values of a term, mapped, [batch, keys, channels], and the keys that they are of (None:
    all)."""
    maps, (own, *rest) = term.maps, term.segments
    if rest or len(maps) > 1 or (maps and not maps[0].covers(own.tokens)):
        return values_of([term])[0].flatten(0, 1), None
    v = own.v.tensor
    v = v[0] if len(v) == 1 else v.flatten(0, 1)
    if not maps:
        return v, None
    used = maps[0].used
    keys = slice(*used) if used is not None and used != (0, own.tokens) else None
    return maps[0].apply_used(v), keys
