"""How a finished sum is evaluated: by the cheapest exact means, with the reason.

pass-through   nothing was rewritten: the model's own call, bit-identical
triton         fused launches on a GPU, where a table says that they win
shared         short keys on a CPU: each distinct softmax once, used by every row
sdpa           one scaled_dot_product_attention per group of like terms
reference      explicit matrices in float64, on request
matrix         rows whose probabilities an editor asked for; the others as above
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hookctl.attention.call import AttentionCall, ReadOut
from hookctl.attention.term import Sum, Term
from hookctl.errors import InputError, UnsupportedError
from hookctl.evaluate import reference, sdpa
from hookctl.evaluate import short_keys as shared
from hookctl.evaluate import special as together
from hookctl.evaluate import triton as fused
from hookctl.evaluate.reference import marginals
from hookctl.evaluate.sdpa import Piece

BACKENDS = ("auto", "triton", "sdpa", "reference")

# Up to this many keys a thin explicit matrix is cheaper than one SDPA call per term, and than SDPA
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

    missing: why it can't run in this installation, None if it can; suits: why it is the one to
    take for a call, None if it is not, asked when `backend` is auto; evaluate: the sums of some
    rows, in pieces of stacked rows.
    """

    name: str
    missing: Callable[[], str | None]
    suits: Callable[[AttentionCall, Sum], str | None]
    evaluate: Callable[[Sum, Sequence[int]], list[Piece]]


def _here() -> None:
    return None


def _suits_shared(call: AttentionCall, finished: Sum) -> str | None:
    terms = [term for terms in finished.terms.values() for term in terms]
    if not _thin(call, terms):
        return None
    return f"{call.k.shape[-2]} keys on a CPU: one softmax serves several rows"


def _thin(call: AttentionCall, terms: Iterable[Term]) -> bool:
    """Whether softmaxes over a short text are to be made on a CPU."""
    return (
        call.site.kind == "cross"
        and call.q.device.type == "cpu"
        and call.q.dtype in (torch.float32, torch.float64)
        and call.k.shape[-2] <= SHORT_KEYS
        and not any(term.regions or term.value_only for term in terms)
    )


# In the order in which `auto` asks them. The last suits every call.
EVALUATORS = (
    Evaluator("triton", fused.missing, fused.suits, fused.evaluate),
    Evaluator("shared", _here, _suits_shared, shared.evaluate),
    Evaluator("reference", _here, lambda call, finished: None, reference.evaluate),
    Evaluator(
        "sdpa",
        _here,
        lambda call, finished: "edited rows by SDPA over rewritten terms",
        sdpa.evaluate,
    ),
)


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
    pieces = evaluator.evaluate(finished, rows) if rows else []
    if finished.functions:
        pieces += reference.evaluate(finished, sorted(finished.functions), dtype=None)
    out = _placed(pieces, call)
    _hand_out(call, finished, backend)
    return out, plan


def read_only(call: AttentionCall, backend: str = "auto") -> None:
    """Serve the read-outs of a call that nothing rewrote."""
    _hand_out(call, call.fold(), backend)


def _choose(call: AttentionCall, finished: Sum, backend: str) -> tuple[Evaluator, Plan]:
    for evaluator in EVALUATORS:
        if backend == evaluator.name:
            reason: str | None = f"backend={backend!r} was asked for"
        else:
            reason = evaluator.suits(call, finished) if backend == "auto" else None
            if reason is not None and evaluator.missing() is not None:
                reason = None
        if reason is None:
            continue
        if not finished.touched:
            # By the same evaluator as the model's own call.
            return EVALUATORS[-1], PASS_THROUGH
        if finished.functions:
            names = {type(o.editor).__name__ for o in call.operations if o.verb == "probabilities"}
            reason = f"{', '.join(sorted(names))} asked for the probabilities"
            return evaluator, Plan("matrix", reason)
        return evaluator, Plan(evaluator.name, reason)
    raise UnsupportedError(f"backend={backend!r} can't evaluate {call.site.path}")


def _placed(pieces: list[Piece], call: AttentionCall) -> Tensor:
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


def _hand_out(call: AttentionCall, finished: Sum, backend: str) -> None:
    read = [_read(finished, request, call, backend) for request in call.read_outs]
    for request, values in zip(call.read_outs, read, strict=True):
        request.into(request.row, values)


def _read(finished: Sum, request: ReadOut, call: AttentionCall, backend: str) -> Tensor:
    """[sub-batch, image queries, tokens], averaged over heads; [sub-batch, tokens] if summed;
    [sub-batch, heads, image queries, tokens] if of each head."""
    row = request.row.index
    if request.summed:
        sums = together.mean_marginals(finished, request, call, backend)
        if sums is None:
            sums = marginals(finished, row, call.spans.image_queries).mean(1)
        return sums[:, request.tokens[0] : request.tokens[-1] + 1]
    start, stop = call.spans.image_queries
    found = together.mean_map(finished, request, call, backend)
    if found is not None:
        return found[:, start:stop]
    own_matrix = row in finished.functions
    if not own_matrix and _thin(call, finished.terms[row]):
        total = shared.columns(finished, row, request.tokens)
    elif own_matrix or (call.site.kind == "cross" and call.k.shape[-2] <= SHORT_KEYS):
        total = reference.columns(finished, row, request.tokens)
    else:
        parts = [
            sdpa.columns(term, finished.mask, request.tokens)
            for term in finished.terms[row]
            if not term.extra
        ]
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return total[:, :, start:stop] if request.heads else total.mean(1)[:, start:stop]
