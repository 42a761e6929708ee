"""How much attention each key receives: the column sums of an attention map, without the map.

    s_m = sum_n A[n, m]

Every query's softmax is complete in itself, so the sums are taken over a few queries at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookctl.attention import reference
from hookctl.attention.term import Ref, Sum, Term
from hookctl.attention.visibility import Regions

_CHUNK = 256


def marginals(finished: Sum, row: int, queries: tuple[int, int]) -> Tensor:
    """The sums over queries start <= n < stop of the edited probabilities of a row's own keys.

    [sub-batch, heads, M], accumulated in float32 at least.
    """
    start, stop = queries
    if row in finished.functions:
        keys = finished.terms[row][0].own.tokens
        whole = reference.columns(finished, row, tuple(range(keys)))
        return whole[..., start:stop, :].sum(-2)
    sums = [
        _of_term(term, finished.mask, start, stop) for term in finished.terms[row] if not term.extra
    ]
    return torch.stack(sums).sum(0)


def _of_term(term: Term, mask: Tensor | None, start: int, stop: int) -> Tensor:
    own, total = term.own.tokens, None
    for first in range(start, stop, _CHUNK):
        at = slice(first, min(first + _CHUNK, stop))
        weight = term.weight[at] if isinstance(term.weight, Tensor) else term.weight
        if term.value_only:
            p = torch.zeros_like(term.own.k.tensor[..., 0], dtype=torch.float32)
            p[..., at] = weight
        else:
            part = mask if mask is None or mask.shape[-2] == 1 else mask[..., at, :]
            p = reference.probabilities(_narrowed(term, at), part)[..., :own]
            p = p.to(torch.promote_types(p.dtype, torch.float32))
            p = (p * weight[:, None] if isinstance(weight, Tensor) else p * weight).sum(-2)
        total = p if total is None else total + p
    assert total is not None  # a site has queries
    for value_map in reversed(term.maps):
        total = value_map.apply_to_probabilities(total)
    return total


def _narrowed(term: Term, at: slice) -> Term:
    """The softmax of a term for some of its queries."""
    regions = term.regions
    return term._replace(
        q=Ref(term.q.base[..., at, :], term.q.row),
        factors=tuple((a if a is None else a[at], b) for a, b in term.factors),
        regions=regions and Regions(regions.queries[at], regions.keys, regions.queries.device),
    )
