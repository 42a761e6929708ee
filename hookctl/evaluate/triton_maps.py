"""Maps by fused kernels: read-outs of one softmax, whose probabilities are never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookctl.attention.arguments import positions
from hookctl.attention.term import Sum, Term
from hookctl.evaluate import reference, sdpa, triton
from hookctl.kernels.common import proof
from hookctl.kernels.common.guard import usable
from hookctl.kernels.common.launch import DTYPES
from hookctl.kernels.common.launch_tables import serves
from hookctl.kernels.common.wins import MAPS, wins

if TYPE_CHECKING:
    from hookctl.attention.call import AttentionCall
    from hookctl.attention.rewriting import ReadOut


def mean_map(finished: Sum, request: ReadOut, call: AttentionCall, backend: str) -> Tensor | None:
    """A read-out averaged over heads, [sub-batch, N, tokens]; None where SDPA serves it."""
    term = _one_softmax(finished, request, call, backend)
    if term is None or request.heads or request.joined:
        return None
    from hookctl.kernels.map_readout import map_readout

    tokens = positions(request.tokens, call.q.device)
    q, k = term.q.tensor, term.own.k.tensor

    def kernel() -> Tensor:
        maps: Tensor = map_readout(q, k, tokens, term.scale)
        return maps.to(call.q.dtype)

    return _served_read(
        "maps", term, kernel, lambda: sdpa.columns(term, None, request.tokens).mean(1), backend
    )


def mean_marginals(
    finished: Sum, request: ReadOut, call: AttentionCall, backend: str
) -> Tensor | None:
    """What each of the row's own keys gets from the image's queries, averaged over heads, float32
    [sub-batch, M]; None where it is summed from explicit probabilities."""
    term = _one_softmax(finished, request, call, backend)
    learns = torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad)
    if term is None or learns:
        return None
    from hookctl.kernels.map_readout import key_marginals

    start, stop = call.spans.image_queries
    q, k = term.q.tensor[..., start:stop, :], term.own.k.tensor
    return _served_read(
        "marginals",
        term,
        lambda: key_marginals(q, k, term.scale),
        lambda: reference.marginals(finished, request.row.index, (start, stop)).mean(1).float(),
        backend,
    )


def _served_read(
    what: str, term: Term, kernel: Callable[[], Tensor], exact: Callable[[], Tensor], backend: str
) -> Tensor:
    q, k = term.q.base, term.own.k.base
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    form = f"{what}, {DTYPES[q.dtype]}, {q.shape[-1]} channels" + ", gradients" * learns
    return proof.served(
        form, q, kernel, exact, lambda x: x, learned=(q, k), demanded=backend == "triton"
    )


def _one_softmax(finished: Sum, request: ReadOut, call: AttentionCall, backend: str) -> Term | None:
    """The one softmax that a read-out is of, where the kernels of `map_readout` are to serve it."""
    q, k, row = call.q, call.k, request.row.index
    if backend == "auto":
        taken = q.dtype in (torch.float16, torch.bfloat16) and q.device.type == "cuda"
        taken = taken and usable(q.device) is None and wins(MAPS, q.device, 1, k.shape[-2])
    else:
        taken = backend == "triton"
    terms = [term for term in finished.terms[row] if not term.extra]
    if not taken or row in finished.functions or len(terms) > 1:
        return None
    (term,) = terms
    if (
        not triton.is_bare(term, finished.mask)
        or q.dtype not in DTYPES
        or q.shape[-1] > triton.REGION_WIDTH
    ):
        return None
    return term if serves(MAPS, q) else None
