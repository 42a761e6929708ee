"""The queries of each of several shares, in lists of one length: all are evaluated in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# What a list costs beside its queries, in queries: its keys are put beside those of the others.
_OF_A_LIST = 16


class TextPlace(NamedTuple):
    """Where a further text stands among the keys, (start, stop); row: the only batch row that has
    it, None where each has its own."""

    start: int
    stop: int
    row: int | None = None


class QueryLists:
    """Which queries ask which share of a division, and where their answers belong.

    shares: the weight of each share for every query, [shares, N], on the CPU; shifts: of the scores
    of each share's tokens, [tokens], None where all count; like: dtype and device of the queries.

    places: the positions of the queries of each list, [lists, length], filled up with 0; back: for
    every query the place of an answer among all answers in a row, [depth, N], and weights,
    [depth, N], what it counts; 0 where a query has had all of its answers.
    """

    def __init__(self, shares: Tensor, shifts: Sequence[Tensor | None], like: Tensor) -> None:
        shares = shares.detach().cpu()
        queries = [share.nonzero()[:, 0] for share in shares]
        length = _length([len(q) for q in queries])
        pieces = [(i, p) for i, q in enumerate(queries) for p in q.split(length) if len(p)]
        self._share_of = [i for i, _ in pieces]
        places = torch.stack([F.pad(p, (0, length - len(p))) for _, p in pieces])
        count, depth = shares.shape[1], int((shares != 0).sum(0).max())
        back = torch.zeros(depth, count, dtype=torch.int64)
        weights = shares.new_zeros(depth, count)
        had = torch.zeros(count, dtype=torch.int64)  # how many answers each query has so far
        for at, (i, p) in enumerate(pieces):
            back[had[p], p] = at * length + torch.arange(len(p))
            weights[had[p], p] = shares[i, p]
            had[p] += 1
        self.places, self.back = places.to(like.device), back.to(like.device)
        self.weights, self._shifts = weights.to(like), shifts
        self._keys: dict[tuple[object, ...], tuple[Tensor, Tensor | None]] = {}

    @torch.inference_mode(False)  # kept for later calls, which may be learned through
    def keys(
        self, texts: tuple[TextPlace, ...], row: int, width: int
    ) -> tuple[Tensor, Tensor | None]:
        """What each list asks, by the places of its tokens among all rows' one after another,
        [lists, tokens], and what is added to their scores, None where all count.

        texts: of the shares; row: whose own texts are meant where each row has its own; width: how
        many tokens a row has.
        """
        key = (texts, row, width)
        if key not in self._keys:
            longest = max(text.stop - text.start for text in texts)
            places = torch.zeros(len(texts), longest, dtype=torch.int64)
            shifts = torch.full(places.shape, float("-inf"))
            for i, (text, shift) in enumerate(zip(texts, self._shifts, strict=True)):
                start = (row if text.row is None else text.row) * width + text.start
                tokens = text.stop - text.start
                places[i, :tokens] = torch.arange(start, start + tokens)
                shifts[i, :tokens] = 0 if shift is None else shift.float().cpu()
            places, shifts = places[self._share_of], shifts[self._share_of]
            added = shifts.to(self.weights) if bool(shifts.any()) else None
            self._keys[key] = places.to(self.places.device), added
        return self._keys[key]


def _length(sizes: list[int]) -> int:
    """Of the lists that hold so many queries each with least to do, the places left empty too."""
    sizes = [size for size in sizes if size]
    candidates = {*sizes, -(-sum(sizes) // len(sizes))}
    return min(candidates, key=lambda n: (n + _OF_A_LIST) * sum(-(-size // n) for size in sizes))
