"""What each output row attends to, as numbers, and the tables that a kernel reads it from.

A stretch is a run of keys with their values; the stretches of one softmax follow each other and
the last closes it. Rows are named, never gathered: a table holds where they lie in their stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

STACKS = 3  # of each of q, k and v in one launch

# Columns of a stretch in the table of integers. Each of q, k, v takes six: the stack, the offset of
# the row, the strides of sub-batch, head, token and channel.
Q, K, V, KEYS, ROW, TERM, CLOSES, WEIGHT, BIAS = 0, 6, 12, 18, 19, 20, 21, 22, 23
COLUMNS = 28  # from BIAS on: offset, strides of sub-batch and head; offsets of the two factors


class Stretch(NamedTuple):
    """One run of keys that an output row attends to.

    row: the output row; q, k, v: rows, counted through the stacks one after the other; weight: of
    the softmax that this stretch closes, and `weights` the row of per-query weights that multiplies
    it; shift: added to the scores; bias, factors: rows of the key biases and of the rank-r
    biases; -1 where there is none; closes: whether the softmax ends here.
    """

    row: int
    q: int
    k: int
    v: int
    weight: float = 1.0
    weights: int = -1
    shift: float = 0.0
    bias: int = -1
    factors: int = -1
    closes: bool = True


class Users(NamedTuple):
    """Which stretches use each source row: tables for a gradient that is summed without atomics.

    sources: [S, 3] stack, offset in a contiguous gradient, tokens; starts: [S + 1]; stretches: [.].
    """

    sources: Tensor
    starts: Tensor
    stretches: Tensor
    rows: int


def encode(stretches: Sequence[Stretch]) -> tuple[list[int], list[float]]:
    """Flat lists, as a custom operator takes them."""
    integers: list[int] = []
    for s in stretches:
        integers += [s.row, s.q, s.k, s.v, s.weights, s.bias, s.factors, int(s.closes)]
    return integers, [number for s in stretches for number in (s.weight, s.shift)]


def decode(integers: Sequence[int], numbers: Sequence[float]) -> list[Stretch]:
    found = []
    for i in range(len(numbers) // 2):
        row, q, k, v, weights, bias, factors, closes = integers[8 * i : 8 * i + 8]
        weight, shift = numbers[2 * i : 2 * i + 2]
        found.append(
            Stretch(row, q, k, v, weight, weights, shift, bias, factors, closes=bool(closes))
        )
    return found


def terms(stretches: Sequence[Stretch]) -> list[list[Stretch]]:
    """The stretches of each softmax."""
    found: list[list[Stretch]] = [[]]
    for stretch in stretches:
        found[-1].append(stretch)
        if stretch.closes:
            found.append([])
    return found[:-1]


class Stack(NamedTuple):
    """How a stack [rows, sub-batch, heads, tokens, channels] lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.shape[-2]


def layout(stacks: Sequence[Tensor]) -> tuple[Stack, ...]:
    return tuple(Stack(tuple(x.shape), x.stride()) for x in stacks)


def locate(rows: Sequence[int], row: int) -> tuple[int, int]:
    """(stack, row in it) of a row counted through stacks of so many rows."""
    for i, count in enumerate(rows):
        if row < count:
            return i, row
        row -= count
    raise IndexError(row)


def row_of(stacks: Sequence[Tensor], row: int) -> Tensor:
    """[sub-batch, heads, tokens, channels]"""
    stack, inner = locate([len(x) for x in stacks], row)
    return stacks[stack][inner]


class Tables:
    """The tables of one kind of call on its device; `tables` keeps them.

    cells: int64 [S, COLUMNS]; numbers: fp32 [S, 2], weight and shift; starts: int32 [rows + 1],
    the first stretch of each output row; terms: of each softmax its output row, its weight and its
    row of per-query weights; single: whether every row has one term.
    """

    def __init__(
        self,
        stretches: Sequence[Stretch],
        rows: int,
        stacks: tuple[tuple[Stack, ...], ...],
        bias: Stack | None,
        factors: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.stretches, self.stacks, self.device = stretches, stacks, device
        counts = [0] * rows
        cells: list[int] = []
        numbers: list[float] = []
        closing = []
        for term, members in enumerate(terms(stretches)):
            end = members[-1]
            closing.append(end)
            for s in members:
                at = [_place(x, row) for x, row in zip(stacks, (s.q, s.k, s.v), strict=True)]
                keys = stacks[1][at[1][0]].tokens
                cells += [*at[0], *at[1], *at[2], keys, s.row, term, int(s.closes), end.weights]
                cells += _bias_place(bias, s.bias)
                cells += [size * s.factors if s.factors >= 0 else -1 for size in factors]
                numbers += [end.weight, s.shift]
                counts[s.row] += 1
        self.terms = [(s.row, s.weight, s.weights) for s in closing]
        self.single = len({s.row for s in closing}) == len(closing)
        self.cells = self._table(cells, torch.int64)
        self.numbers = self._table(numbers, torch.float32)
        self.starts = self._table([0, *accumulate(counts)], torch.int32)
        self.users = lru_cache(maxsize=64)(self._users)

    def _table(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _users(self, which: int, wanted: tuple[bool, ...]) -> Users:
        """Who uses the rows of the stacks of q (0), k (1) or v (2) whose gradient is wanted."""
        stacks = self.stacks[which]
        rows = [stack.shape[0] for stack in stacks]
        users: dict[int, list[int]] = {}
        for i, s in enumerate(self.stretches):
            row = (s.q, s.k, s.v)[which]
            if wanted[locate(rows, row)[0]]:
                users.setdefault(row, []).append(i)
        sources: list[int] = []
        for row in users:
            stack, inner = locate(rows, row)
            shape = stacks[stack].shape
            sources += [stack, inner * prod(shape[1:]), shape[-2]]
        starts = [0, *accumulate(len(found) for found in users.values())]
        return Users(
            self._table(sources, torch.int64),
            self._table(starts, torch.int32),
            self._table([i for found in users.values() for i in found], torch.int32),
            len(users),
        )


@lru_cache(maxsize=256)
def tables(
    integers: tuple[int, ...],
    numbers: tuple[float, ...],
    rows: int,
    stacks: tuple[tuple[Stack, ...], ...],
    bias: Stack | None,
    factors: tuple[int, int],
    device: torch.device,
) -> Tables:
    """Made and copied to the device once: all steps of a sampler attend alike.

    factors: elements of one row of the query and of the key factors.
    """
    return Tables(decode(integers, numbers), rows, stacks, bias, factors, device)


def _place(stacks: Sequence[Stack], row: int) -> list[int]:
    stack, inner = locate([x.shape[0] for x in stacks], row)
    of_row, *strides = stacks[stack].stride
    return [stack, inner * of_row, *strides]


def _bias_place(bias: Stack | None, row: int) -> list[int]:
    if bias is None or row < 0:
        return [-1, 0, 0]
    of_row, of_sub, of_head, *_ = bias.stride
    return [row * of_row, of_sub, of_head]
