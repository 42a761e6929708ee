"""How a finished sum is evaluated: by the cheapest exact means, with the reason.

    pass-through   nothing was rewritten: the model's own call, bit-identical
    sdpa           one scaled_dot_product_attention per group of like terms
    shared         short keys on a CPU: each distinct softmax once, used by every row
    matrix         an editor asked for the probabilities themselves
    reference      explicit matrices in float64, on request

Rows that no editor touched keep the model's own call wherever that is not dearer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.attention import reference, sdpa, shared
from hookctl.attention.call import AttentionCall, ReadOut
from hookctl.attention.term import Sum
from hookctl.errors import InputError, UnsupportedError

BACKENDS = ("auto", "triton", "sdpa", "reference")

# Measured on a CPU (torch 2.13, float32, one thread): up to this many keys a thin explicit matrix
# beats one SDPA call per term, and up to this many queries it beats SDPA for the rows that no
# editor touched as well.
SHORT_KEYS = 256
FEW_QUERIES = 1024


@dataclass(frozen=True)
class Plan:
    """What evaluated one attention call, and why."""

    name: str
    reason: str


PASS_THROUGH = Plan("pass-through", "no editor rewrote this call")

Original = Callable[[slice | None], Tensor]


def check_backend(backend: str) -> None:
    """Raise InputError for a backend that does not exist, UnsupportedError for one not here."""
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r}; give one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise UnsupportedError(
            "backend='triton': this build has no fused kernels; use 'auto' or 'sdpa'"
        )


def evaluate(call: AttentionCall, backend: str = "auto") -> tuple[Tensor, Plan]:
    """Evaluate an edited call.

    Returns the output, a stack [rows, sub-batch, heads, N, channels], and the plan. The caller
    passes calls without any operation through itself.
    """
    finished = call.fold()
    plan = _choose(call, finished, backend)
    out: Tensor
    if plan.name == "reference":
        edits = [call.overrides.get(row, []) for row in range(len(finished.terms))]
        out = reference.evaluate([finished.terms[r] for r in finished.terms], call.mask, edits)
    else:
        out = _by_rows(call, finished, plan)
    for request in call.read_outs:
        request.into(request.row, _read(finished, request, call))
    return out, plan


def read_only(call: AttentionCall) -> None:
    """Serve the read-outs of a call that nothing rewrote."""
    finished = call.fold()
    for request in call.read_outs:
        request.into(request.row, _read(finished, request, call))


def _choose(call: AttentionCall, finished: Sum, backend: str) -> Plan:
    if backend == "reference":
        return Plan("reference", "backend='reference' was asked for")
    if call.overrides:
        names = ", ".join(sorted({type(o.editor).__name__ for o in call.operations}))
        return Plan("matrix", f"{names} asked for the probabilities")
    keys = call.k.shape[-2]
    routed = any(
        len(finished.terms[row]) > 1 or finished.terms[row][0].maps for row in finished.touched
    )
    plain = all(
        t.regions is None and not t.value_only for row in finished.terms.values() for t in row
    )
    if (
        backend == "auto"
        and routed
        and plain
        and keys <= SHORT_KEYS
        and call.q.device.type == "cpu"
    ):
        return Plan("shared", f"{keys} keys on a CPU: one softmax serves several rows")
    return Plan("sdpa", "edited rows by SDPA over rewritten terms")


def _by_rows(call: AttentionCall, finished: Sum, plan: Plan) -> Tensor:
    rows = list(finished.terms)
    done: dict[int, Tensor] = {}
    if plan.name == "shared":
        chosen = rows if call.q.shape[-2] <= FEW_QUERIES else _with_sources(finished)
        parts = shared.evaluate([finished.terms[row] for row in chosen], call.mask)
        done = dict(zip(chosen, parts, strict=True))
    for row in call.overrides:
        done[row] = reference.evaluate(
            [finished.terms[row]], call.mask, [call.overrides[row]], dtype=None
        )[0]
    left = [row for row in rows if row not in done]
    groups = [
        (group, sdpa.evaluate([finished.terms[row] for row in group], call.mask))
        for group in finished.groups(left)
    ]
    if not done and len(groups) == 1:
        return groups[0][1]
    out = call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1])
    for group, part in groups:
        out[_index(group)] = part
    for row, one in done.items():
        out[row] = one
    return out


def _with_sources(finished: Sum) -> list[int]:
    """Edited rows, and the rows whose probabilities they use: those come free."""
    rows = set(finished.touched)
    rows |= {term.q.row for row in finished.touched for term in finished.terms[row]}
    return sorted(rows)


def _index(rows: list[int]) -> slice | list[int]:
    adjacent = all(b - a == 1 for a, b in zip(rows, rows[1:], strict=False))
    return slice(rows[0], rows[-1] + 1) if adjacent else rows


def _read(finished: Sum, request: ReadOut, call: AttentionCall) -> Tensor:
    total: Tensor | None = None
    for term in finished.terms[request.row.index]:
        part = sdpa.columns(term, finished.mask, request.tokens)
        total = part if total is None else total + part
    assert total is not None  # a row has at least one term
    start, stop = call.spans.image_queries
    return total.mean(1)[:, start:stop]


def stack_rows(x: Tensor, rows: int) -> Tensor:
    """[batch, heads, tokens, channels] -> [rows, sub-batch, heads, tokens, channels]."""
    if x.shape[0] % rows:
        raise UnsupportedError(
            f"an attention call has a batch of {x.shape[0]}, which is no multiple of the "
            f"denoiser's {rows} rows"
        )
    return x.unflatten(0, (rows, -1))


def stack_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """The model's mask as a stack [rows | 1, sub-batch | 1, heads | 1, N | 1, M]."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask[None] if mask.dim() < 3 else mask[:, None]
    return mask[None] if mask.shape[0] == 1 else stack_rows(mask, rows)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
