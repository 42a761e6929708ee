"""Terms over short keys, on a CPU: every distinct softmax formed once, for all that need it.

Over 77 text tokens the matrix of attention is N x 77. The source's probabilities serve the source's
edits at once, one softmax and several value tensors, and the maps that are read of them. Values
that a token map gives no weight are not multiplied. Of many queries only a block is at work at a
time: the matrix is never in memory as a whole, and what a cache holds is used before it leaves it.
On a CPU this beats one SDPA call per term.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from hookctl.attention.arguments import positions
from hookctl.attention.rewriting import ReadOut
from hookctl.attention.term import Sum, Term
from hookctl.evaluate.sdpa import Piece, one_hot_values
from hookctl.evaluate.short_softmax import Read, Softmax, Use, at_once, evaluate_batch


def evaluate(
    finished: Sum, rows: Sequence[int], requests: Sequence[ReadOut] = ()
) -> tuple[list[Piece], list[Tensor]]:
    """The sums of some rows, and maps of rows that are read.

    Returns one piece [rows, sub-batch, heads, N, channels] (none without rows), and for each
    request the edited probabilities of its tokens among the row's own keys,
    [sub-batch, heads, N, tokens].
    """
    softmaxes: dict[Hashable, Softmax] = {}
    for place, row in enumerate(rows):
        for term in finished.terms[row]:
            _softmax_of(term, finished.mask, softmaxes).uses.append(Use(place, term))
    parts = [
        [
            _reading(term, request, _softmax_of(term, finished.mask, softmaxes))
            for term in finished.terms[request.row.index]
            if not term.extra
        ]
        for request in requests
    ]
    out = _unwritten(finished.terms[rows[0]][0], len(rows)) if rows else None
    written: set[int] = set()
    for batch in _batches(list(softmaxes.values())):
        evaluate_batch(batch, finished.mask, out, written)
    maps = [_summed(of_request) for of_request in parts]
    shape = finished.terms[0][0].q.base.shape[1:3]
    return [] if out is None else [(list(rows), out)], [m.unflatten(0, shape) for m in maps]


def _softmax_of(term: Term, mask: Tensor | None, known: dict[Hashable, Softmax]) -> Softmax:
    """The probabilities of a term: those of an equal softmax, if one is there."""
    q, masked = term.q, mask is not None
    key = (
        (id(q.base), q.row, term.scale),
        *[(id(s.k.base), s.k.row, masked and s.mask_row, id(s.shift)) for s in term.segments],
        *[id(pair) for pair in term.factors],
    )
    if key not in known:
        known[key] = Softmax(term)
    return known[key]


def _reading(term: Term, request: ReadOut, softmax: Softmax) -> list[Tensor]:
    into: list[Tensor] = []
    place = positions(request.tokens, term.q.base.device)
    values = one_hot_values(term, request.tokens, term.q.base) if term.maps else None
    softmax.reads.append(Read(place, values, term.weight, into))
    return into


def _summed(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """The map of a request: its terms' blocks of queries put together, and the terms added."""
    whole = [blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), 1) for blocks in parts]
    return whole[0] if len(whole) == 1 else torch.stack(whole).sum(0)


def _batches(softmaxes: Sequence[Softmax]) -> Iterator[list[Softmax]]:
    """Softmaxes of one form, as many as are formed at once; large ones alone, read where they
    lie."""
    alike: dict[Hashable, list[Softmax]] = {}
    for softmax in softmaxes:
        term = softmax.term
        key = (
            (id(term.q.base), term.scale),
            *[(id(s.k.base), s.mask_row is None, s.shift is None) for s in term.segments],
            *[id(pair) for pair in term.factors],
        )
        alike.setdefault(key, []).append(softmax)
    for group in alike.values():
        _, sub, heads, queries, _ = group[0].term.q.base.shape
        keys = sum(s.tokens for s in group[0].term.segments)
        size = max(1, at_once() // max(1, sub * heads * queries * keys))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _unwritten(like: Term, rows: int) -> Tensor:
    """[rows, sub-batch, heads, N, channels], never read before it is written."""
    q = like.q.base
    _, sub, heads, tokens, _ = q.shape
    channels = like.own.v.base.shape[-1]
    if sub > 1:
        return q.new_empty(rows, sub, heads, tokens, channels)
    # Tokens before heads: merging the heads afterwards copies nothing.
    return q.new_empty(rows, sub, tokens, heads, channels).transpose(2, 3)
