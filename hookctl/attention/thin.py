"""A softmax over few keys, made for a block of queries at a time and put to values at once.

Over 77 text tokens the matrix is thin (N x 77). Of many queries only a block is at work: the matrix
is never in memory as a whole, and what a cache holds is used before it leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hookctl.attention.assemble import factors_bias, key_bias
from hookctl.attention.term import Term

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
