"""What the sum of terms leaves to kernels of their own: equal probabilities, regions, maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookctl.attention import sdpa
from hookctl.attention.assemble import Scores
from hookctl.attention.prepared import positions
from hookctl.attention.sdpa import Piece
from hookctl.attention.term import Sum, Term
from hookctl.attention.visibility import Regions
from hookctl.kernels.common.guard import usable
from hookctl.kernels.common.launch import DTYPES
from hookctl.kernels.common.launch_tables import serves
from hookctl.kernels.common.wins import MAPS, REGIONS, SHARED, wins

if TYPE_CHECKING:
    from hookctl.attention.call import AttentionCall, ReadOut

REGION_WIDTH = 160  # widest head of the kernels of regions and maps


def suits(call: AttentionCall, finished: Sum) -> str | None:
    """Why a call is faster by one of these kernels; None where it is not."""
    device, keys = call.q.device, call.k.shape[-2]
    most = max((len(rows) for rows in sharing(finished, range(finished.rows)).values()), default=0)
    if wins(SHARED, device, most, keys):
        return f"{most} rows of one softmax: its products are formed once"
    kinds = max(
        (t.regions.kinds for ts in finished.terms.values() for t in ts if t.regions), default=0
    )
    if wins(REGIONS, device, kinds, keys):
        return f"{kinds} kinds of queries by region: one launch, no mask and nothing gathered"
    return None


def sharing(finished: Sum, rows: Sequence[int]) -> dict[tuple[Any, ...], list[int]]:
    """Rows whose one softmax is the same, two or more of each.

    Keys: what q, k and v are rows of, the scale; then the rows of q and k.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        term, *others = finished.terms[row]
        if not others and _bare(term, finished.mask):
            q, k, v = term.q, term.own.k, term.own.v
            key = (id(q.base), id(k.base), id(v.base), term.scale, q.row, k.row)
            found.setdefault(key, []).append(row)
    return {key: alike for key, alike in found.items() if len(alike) > 1}


def shared(finished: Sum, rows: Sequence[int]) -> tuple[list[Piece], list[int]]:
    """The rows that share their probabilities, one launch for each choice of stacks; the rest."""
    from hookctl.kernels.shared_probabilities import Group, shared_probabilities

    launches: dict[tuple[Any, ...], list[list[int]]] = {}
    for key, alike in sharing(finished, rows).items():
        launches.setdefault(key[:4], []).append(alike)
    pieces: list[Piece] = []
    for groups in launches.values():
        first = finished.terms[groups[0][0]][0]
        named = []
        for alike in groups:
            terms = [finished.terms[row][0] for row in alike]
            values = tuple(term.own.v.row for term in terms)
            named.append(Group(terms[0].q.row, terms[0].own.k.row, values))
        stacks = first.q.base, first.own.k.base, first.own.v.base
        out, _ = shared_probabilities(*stacks, named, first.scale)
        pieces.append(([row for alike in groups for row in alike], out))
    done = {row for group, _ in pieces for row in group}
    return pieces, [row for row in rows if row not in done]


def _bare(term: Term, mask: Tensor | None) -> bool:
    """Whether a term is a softmax of q and k alone over values as they are."""
    own = term.own
    edited = (
        term.maps
        or term.factors
        or term.regions is not None
        or term.value_only
        or own.shift is not None
        or not own.counts
        or (mask is not None and own.mask_row is not None)
    )
    whole = not isinstance(term.weight, Tensor) and term.weight == 1.0
    return not edited and whole and len(term.segments) == 1


def attend(scores: Scores, v: Tensor, regions: Regions | None = None) -> Tensor:
    """As `sdpa.attend`, regions without biases by their kernel."""
    q, k = scores.q, scores.k
    alike = q.shape[-1] == k.shape[-1] == v.shape[-1] <= REGION_WIDTH
    if regions is None or scores.bias is not None or not alike or q.dtype not in DTYPES:
        return sdpa.attend(scores, v, regions)
    if not serves(REGIONS, q):
        return sdpa.attend(scores, v, regions)
    from hookctl.kernels.region_attention import lists, region_attention

    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    sets, form = (regions.queries, regions.keys), (q.dtype, q.shape[-1])
    if form not in regions.tiles:
        regions.tiles[form] = lists(*sets, q)
    out, _ = region_attention(q, k, v, *sets, scores.scale, regions.tiles[form])
    return out.unflatten(0, scores.q.shape[:2])


def mean_map(finished: Sum, request: ReadOut, call: AttentionCall, backend: str) -> Tensor | None:
    """A read-out averaged over heads, [sub-batch, N, tokens]; None where SDPA serves it."""
    term = _thin(finished, request, call, backend)
    if term is None or request.heads:
        return None
    from hookctl.kernels.map_readout import map_readout

    tokens = positions(request.tokens, call.q.device)
    maps: Tensor = map_readout(term.q.tensor, term.own.k.tensor, tokens, term.scale)
    return maps.to(call.q.dtype)


def mean_marginals(
    finished: Sum, request: ReadOut, call: AttentionCall, backend: str
) -> Tensor | None:
    """What each of the row's own keys gets from the picture's queries, averaged over heads, float32
    [sub-batch, M]; None where it is summed from explicit probabilities."""
    term = _thin(finished, request, call, backend)
    learns = torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad)
    if term is None or learns:
        return None
    from hookctl.kernels.map_readout import key_marginals

    start, stop = call.spans.image_queries
    sums: Tensor = key_marginals(term.q.tensor[..., start:stop, :], term.own.k.tensor, term.scale)
    return sums


def _thin(finished: Sum, request: ReadOut, call: AttentionCall, backend: str) -> Term | None:
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
    if not _bare(term, finished.mask) or q.dtype not in DTYPES or q.shape[-1] > REGION_WIDTH:
        return None
    return term if serves(MAPS, q) else None
