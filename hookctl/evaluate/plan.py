"""How a finished sum is evaluated: by the cheapest exact means, with the reason.

pass-through   nothing was rewritten: the model's own call, bit-identical
triton         fused launches on a GPU, where a table says that they win
short keys     on a CPU: each distinct softmax once, used by every row and every map
sdpa           one scaled_dot_product_attention per group of like terms
reference      explicit matrices in float64, on request
matrix         rows whose probabilities an editor asked for; the others as above
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hookctl.attention.call import AttentionCall
from hookctl.attention.rewriting import ReadOut
from hookctl.attention.term import Sum, Term
from hookctl.errors import InputError, UnsupportedError
from hookctl.evaluate import combine, lists, reference, sdpa, short_keys, triton, triton_maps
from hookctl.evaluate.sdpa import Piece

BACKENDS = ("auto", "triton", "sdpa", "reference")

# Up to this many keys explicit probabilities are cheaper than one SDPA call per term, and than SDPA
# for the rows that no editor touched as well. Measured on a CPU: hookctl bench calls.
SHORT_KEYS = 128


class Plan(NamedTuple):
    """What evaluated one attention call, and why."""

    name: str
    reason: str


PASS_THROUGH = Plan("pass-through", "no editor rewrote this call")


@dataclass(frozen=True)
class Evaluator:
    """A way to evaluate a finished sum.

    missing: why it can't run in this installation, None if it can; evaluate: the sums of some
    rows, in pieces of stacked rows.
    """

    name: str
    missing: Callable[[], str | None]
    evaluate: Callable[[Sum, Sequence[int]], list[Piece]]


def _never_missing() -> None:
    return None


def _has_short_keys(call: AttentionCall, terms: Iterable[Term]) -> bool:
    """Whether softmaxes over a short text are to be made on a CPU."""
    return (
        call.site.kind == "cross"
        and call.q.device.type == "cpu"
        and call.q.dtype in (torch.float32, torch.float64)
        and call.k.shape[-2] <= SHORT_KEYS
        and not any(term.regions or term.value_only for term in terms)
    )


TRITON = Evaluator("triton", triton.missing, triton.evaluate)
SHORT = Evaluator("short keys", _never_missing, lambda *of: short_keys.evaluate(*of)[0])
REFERENCE = Evaluator("reference", _never_missing, reference.evaluate)
SDPA = Evaluator("sdpa", _never_missing, sdpa.evaluate)
EVALUATORS = (TRITON, SHORT, REFERENCE, SDPA)


def check_backend(backend: str) -> None:
    """Raise InputError for a backend that does not exist, UnsupportedError for one not here."""
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r}; give one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return
    found = [e for e in EVALUATORS if e.name == backend]
    missing = found[0].missing()
    if missing:
        raise UnsupportedError(f"backend={backend!r}: {missing}; use 'auto' or 'sdpa'")


def evaluate(call: AttentionCall, backend: str = "auto") -> tuple[Tensor, Plan]:
    """Evaluate an edited call, and hand out what is read of it.

    Returns the output, a stack [rows, sub-batch, heads, N, channels], and the plan. The caller
    passes calls without any operation through itself.
    """
    finished = call.fold()
    evaluator, plan = _choose(call, finished, backend)
    rows = [row for row in range(finished.rows) if row not in finished.functions]
    apart: list[lists.Batch] = []
    by = evaluator.evaluate
    if evaluator is TRITON:
        by = partial(triton.served, demanded=backend == "triton")
    if evaluator in (SHORT, SDPA):
        finished = finished.spelled_out(finished.functions)
        apart = lists.batches(finished)
    else:
        finished = finished.spelled_out()
    read: Reading = {}
    if evaluator is SHORT:
        # The output and the maps of one softmax.
        requests = _columns_of(call, finished)
        pieces, maps = short_keys.evaluate(finished, rows, requests)
        read = dict(zip(map(id, requests), maps, strict=True))
    else:
        pieces = by(finished, rows) if rows else []
        if evaluator is TRITON and backend == "auto" and rows:
            if why := triton.refused(finished, rows):
                plan = plan._replace(name="sdpa", reason=f"a kernel failed here: {why}")
    if finished.functions:
        pieces += reference.evaluate(finished, sorted(finished.functions), dtype=None)
    out = _in_row_order(pieces, call)
    for batch in apart:
        out = lists.add(out, batch)
    if finished.combined:
        out = combine.combined(out, finished, by)
    _hand_out(call, finished, backend, read)
    return out, plan


def read_only(call: AttentionCall, backend: str = "auto") -> None:
    """Serve the read-outs of a call that nothing rewrote."""
    finished, read = call.fold(), dict[int, Tensor]()
    if backend == "auto" and _has_short_keys(call, ()):
        requests = _columns_of(call, finished)
        maps = short_keys.evaluate(finished, (), requests)[1]
        read = dict(zip(map(id, requests), maps, strict=True))
    _hand_out(call, finished, backend, read)


def _choose(call: AttentionCall, finished: Sum, backend: str) -> tuple[Evaluator, Plan]:
    if backend == "auto":
        evaluator, reason = _cheapest(call, finished)
    else:
        evaluator = next(e for e in EVALUATORS if e.name == backend)
        reason = f"backend={backend!r} was asked for"
    if not finished.touched:
        return SDPA, PASS_THROUGH  # by the same evaluator as the model's own call
    if finished.functions:
        names = {type(o.editor).__name__ for o in call.operations if o.verb == "probabilities"}
        reason = f"{', '.join(sorted(names))} asked for the probabilities"
        return evaluator, Plan("matrix", reason)
    return evaluator, Plan(evaluator.name, reason)


def _cheapest(call: AttentionCall, finished: Sum) -> tuple[Evaluator, str]:
    """The first evaluator that suits a call, and why."""
    reason = triton.suits(call, finished)
    if reason is not None and TRITON.missing() is None:
        return TRITON, reason
    if call.site.kind == "cross":
        terms = [term for terms in finished.terms.values() for term in terms]
        if _has_short_keys(call, terms):
            return SHORT, "short keys on a CPU: one softmax serves several rows"
    return SDPA, "edited rows by SDPA over rewritten terms"


def _in_row_order(pieces: list[Piece], call: AttentionCall) -> Tensor:
    """Pieces put together, laid out so that merging the heads afterwards copies nothing."""
    if len(pieces) == 1:
        return pieces[0][1]
    pieces = sorted(pieces, key=_first)
    order = [row for group, _ in pieces for row in group]
    if order == sorted(order):
        return torch.cat([part.transpose(2, 3) for _, part in pieces]).transpose(2, 3)
    rows, sub, heads, tokens, _ = call.q.shape
    out = call.q.new_empty(rows, sub, tokens, heads, call.v.shape[-1]).transpose(2, 3)
    for group, part in pieces:
        # Row by row: nothing is gained by indexing several at once, and lists copy to a device.
        for row, one in zip(group, part.unbind(0), strict=True):
            out[row] = one
    return out


def _first(piece: Piece) -> int:
    return piece[0][0]


# -- reading ---------------------------------------------------------------------------------------

# By the identity of a request: its map of each head, [sub-batch, heads, N, tokens].
Reading = dict[int, Tensor]


def _columns_of(call: AttentionCall, finished: Sum) -> list[ReadOut]:
    """The read-outs that are columns of a softmax over short keys."""
    return [
        request
        for request in call.read_outs
        if not request.summed
        and not request.queries
        and not request.joined
        and request.row.index not in finished.functions
        and _has_short_keys(call, finished.terms[request.row.index])
    ]


def _hand_out(call: AttentionCall, finished: Sum, backend: str, read: Reading) -> None:
    if not call.read_outs:
        return
    start, stop = call.spans.image_queries
    values = []
    for request in call.read_outs:
        if request.summed:
            values.append(_sums(finished, request, call, backend))
        elif request.queries:
            lines = reference.of_queries(finished, request.row.index, request.queries)
            values.append(lines[..., request.tokens[0] : request.tokens[-1] + 1].mean(1))
        elif (mean := triton_maps.mean_map(finished, request, call, backend)) is not None:
            values.append(mean[:, start:stop])
        else:
            of_heads = read.get(id(request))
            if of_heads is None:
                of_heads = _columns(finished, request, call)
            heads = of_heads if request.heads else of_heads.mean(1)
            values.append(heads[..., start:stop, :])
    for request, found in zip(call.read_outs, values, strict=True):
        request.into(request.row, found)


def _sums(finished: Sum, request: ReadOut, call: AttentionCall, backend: str) -> Tensor:
    """[sub-batch, tokens]: what each key gets from the image's queries, averaged over heads."""
    sums = triton_maps.mean_marginals(finished, request, call, backend)
    if sums is None:
        sums = reference.marginals(finished, request.row.index, call.spans.image_queries).mean(1)
    return sums[:, request.tokens[0] : request.tokens[-1] + 1]


def _columns(finished: Sum, request: ReadOut, call: AttentionCall) -> Tensor:
    """[sub-batch, heads, N, tokens]"""
    row = request.row.index
    if row in finished.functions or (call.site.kind == "cross" and call.k.shape[-2] <= SHORT_KEYS):
        columns = reference.columns(finished, row, request.tokens)
        return columns.sum(-1, keepdim=True) if request.joined else columns
    parts = [
        sdpa.columns(term, finished.mask, request.tokens, joined=request.joined)
        for term in finished.terms[row]
        if not term.extra
    ]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
