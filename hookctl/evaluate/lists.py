"""Shares of a division, each for its own queries alone and all in one batch.

Every query asks the texts that it has a share in and no other, so that the cost is that of the
places where shares lie, however many shares there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.attention.term import Divided, Sum
from hookctl.evaluate.gather import Scores, followed, rows_of
from hookctl.evaluate.sdpa import attend


@dataclass(eq=False)
class Batch:
    """Rows that ask the same texts by the same lists."""

    rows: list[int]
    divided: Divided

    def answers(self) -> Tensor:
        """[rows, sub-batch, lists * length, heads, channels]"""
        one, lists = self.divided, self.divided.lists
        places, shift = lists.keys(one.texts, self.rows[0], one.k.shape[-2])
        # Tokens stand before heads in memory, so a list's are copied as they lie.
        q = rows_of(one.q, self.rows).transpose(2, 3).index_select(2, lists.places.flatten())
        # [sub-batch * lists, heads, rows * length, channels]
        q = q.unflatten(2, lists.places.shape).permute(1, 2, 4, 0, 3, 5).flatten(3, 4)
        k, v = (_of_lists(x, places) for x in (one.k, one.v))
        bias = None if shift is None else shift.repeat(q.shape[0], 1)[:, None, None, None]
        scores = Scores(q.flatten(0, 1)[:, None], k, bias, one.scale)
        out = attend(scores, v)[:, 0].unflatten(0, q.shape[:2])
        out = out.unflatten(3, (len(self.rows), -1))
        return out.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)


def _of_lists(x: Tensor, places: Tensor) -> Tensor:
    """Keys or values of each list, [sub-batch * lists, 1, heads, tokens, channels].

    x: [rows, sub-batch, heads, tokens, channels]; places: [lists, tokens].
    """
    every = x.permute(0, 3, 1, 2, 4).flatten(0, 1).index_select(0, places.flatten())
    return every.unflatten(0, places.shape).permute(2, 0, 3, 1, 4).flatten(0, 1)[:, None]


def batches(finished: Sum) -> list[Batch]:
    """What divisions add to a sum, rows of equal texts together."""
    found: dict[object, Batch] = {}
    for row, several in finished.divided.items():
        for one in several:
            own = any(text.row is None for text in one.texts)
            key = (one.lists, id(one.q), id(one.k), one.texts, row if own else None)
            found.setdefault(key, Batch([], one)).rows.append(row)
    return list(found.values())


def add(out: Tensor, batch: Batch) -> Tensor:
    """The output of a call, [rows, sub-batch, heads, N, channels], with what a batch adds to it."""
    answers, lists = batch.answers(), batch.divided.lists
    for back, weights in zip(lists.back, lists.weights, strict=True):
        part = (answers.index_select(2, back) * weights[:, None, None]).transpose(2, 3)
        if followed(out) or followed(part):
            places = torch.tensor(batch.rows, device=out.device)
            out = out.index_add(0, places, part.to(out))
            continue
        for row, one in zip(batch.rows, part.unbind(0), strict=True):
            out[row] += one
    return out
