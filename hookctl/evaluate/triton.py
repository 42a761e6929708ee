"""Terms by fused kernels: the rows of a finished sum are named to them, and nothing is gathered.

Rows of equal probabilities, regions and maps have kernels of their own. Dense masks over queries
and keys, identity attention, learned biases and terms of more stacks than one launch takes are left
to SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookctl.attention.key_regions import KeyRegions
from hookctl.attention.term import Sum, Term
from hookctl.evaluate import sdpa
from hookctl.evaluate.gather import Scores
from hookctl.evaluate.packing import launch
from hookctl.evaluate.sdpa import Piece
from hookctl.kernels.common import proof
from hookctl.kernels.common.guard import usable
from hookctl.kernels.common.launch import DTYPES, WIDEST, in_one_grid, interpreting
from hookctl.kernels.common.launch_tables import SHORT, learns_ranked, serves, short_form
from hookctl.kernels.common.wins import REGIONS, SHARED, TERMS, wins

if TYPE_CHECKING:
    from hookctl.attention.call import AttentionCall

_HALVES = (torch.float16, torch.bfloat16)
REGION_WIDTH = 160  # widest head of the kernels of regions and maps


def missing() -> str | None:
    """Why the kernels can't run here at all; None if they can."""
    return usable("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")


def suits(call: AttentionCall, finished: Sum) -> str | None:
    """Why a call is faster in one launch; None where SDPA stays."""
    reason = _gains(call, finished)
    rows = [row for row in range(finished.rows) if row not in finished.functions]
    return None if reason is None or (rows and refused(finished, rows)) else reason


def _gains(call: AttentionCall, finished: Sum) -> str | None:
    q = call.q
    if q.device.type != "cuda" or q.dtype not in _HALVES or usable(q.device):
        return None
    if not in_one_grid(q):  # many frames or places, each a sequence of its own
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, call.k, call.v)):
        return None
    if finished.divided:
        return None  # a kernel would ask every text for every query
    most, keys = max((len(terms) for terms in finished.terms.values()), default=0), call.k.shape[-2]
    if (
        wins(TERMS, q.device, most, q.shape[-2])
        # Longer keys, whose softmax no form holds whole, are better off with SDPA's own kernels.
        and short_form(q, keys)
        and all(_fits(t, finished.mask) for ts in finished.terms.values() for t in ts)
    ):
        return f"{most} terms over {keys} keys: one launch writes the output once"
    return _suits_others(call, finished)


def served(finished: Sum, rows: Sequence[int], *, demanded: bool = False) -> list[Piece]:
    """`evaluate`, or SDPA where the kernels prove wrong on this device.

    demanded: RuntimeError in place of SDPA.
    """
    first = finished.terms[rows[0]][0]
    terms = [term for row in rows for term in finished.terms[row]]
    stacks = {
        id(x.base): x.base for t in terms for x in (t.q, *[y for s in t.segments for y in s[:2]])
    }
    return proof.served(
        form_of(finished, rows),
        first.q.base,
        lambda: evaluate(finished, rows),
        lambda: sdpa.evaluate(finished, rows),
        _flat,
        learned=list(stacks.values()) if torch.is_grad_enabled() else (),
        demanded=demanded,
    )


def refused(finished: Sum, rows: Sequence[int]) -> str | None:
    """Why the kernels are not used for such terms on this device; None if they may be."""
    return proof.refused(form_of(finished, rows), finished.terms[rows[0]][0].q.base)


def form_of(finished: Sum, rows: Sequence[int]) -> str:
    """What of a call's terms is compiled apart, in words."""
    q = finished.terms[rows[0]][0].q.base
    kinds = {_kind(term, finished.mask) for row in rows for term in finished.terms[row]}
    most = max(len(finished.terms[row]) for row in rows)
    kinds |= {"several terms"} if most > 1 else set()
    kinds |= {"shared rows"} if _sharing(finished, rows) else set()
    learns = torch.is_grad_enabled() and q.requires_grad
    kinds |= {"gradients"} if learns else set()
    return f"{DTYPES.get(q.dtype, q.dtype)}, {q.shape[-1]} channels: {'; '.join(sorted(kinds))}"


def _kind(term: Term, mask: Tensor | None) -> str:
    keys = sum(segment.tokens for segment in term.segments)
    size = next((f"up to {most} keys" for most in SHORT if keys <= most), "long keys")
    shifted = any(segment.shift is not None for segment in term.segments)
    masked = mask is not None and any(s.mask_row is not None for s in term.segments)
    said = {
        "stretches": len(term.segments) > 1,
        "bias": shifted or masked,
        "rank-r bias": bool(term.factors),
        "weights": isinstance(term.weight, Tensor),
        "regions": term.regions is not None,
        "mapped values": bool(term.maps),
        "identity": term.value_only,
    }
    return " with ".join([size, *[word for word, true in said.items() if true]])


def _flat(pieces: list[Piece]) -> Tensor:
    """The rows of pieces in order, to compare them."""
    rows = {row: part[i] for group, part in pieces for i, row in enumerate(group)}
    return torch.stack([rows[row] for row in sorted(rows)])


def evaluate(finished: Sum, rows: Sequence[int]) -> list[Piece]:
    """The sums of some rows, in pieces [rows, sub-batch, heads, N, channels]."""
    mask = finished.mask
    fit = [row for row in rows if all(_fits(t, mask) for t in finished.terms[row])]
    rest = [row for row in rows if row not in fit]
    pieces, fit = _shared(finished, fit)
    # Over long keys a row that nothing rewrote is as fast by the model's own means as by any.
    long = [r for r in fit if r not in finished.terms and _keys(finished, r) > max(SHORT)]
    fit = [row for row in fit if row not in long]
    pieces += sdpa.evaluate(finished, rest + long, attend) if rest or long else []
    whole = launch(finished, fit) if fit else None
    if whole:
        return [*pieces, whole]
    for group in finished.groups(fit):
        piece = launch(finished, group)
        pieces += [piece] if piece else sdpa.evaluate(finished, group)
    return pieces


def _keys(finished: Sum, row: int) -> int:
    return finished.terms[row][0].own.tokens


def _fits(term: Term, mask: Tensor | None) -> bool:
    """Whether the kernel can express a term."""
    q, own = term.q.base, term.own
    bare = not term.value_only and term.regions is None
    if not bare or q.dtype not in DTYPES or not in_one_grid(q):
        return False
    of_queries = mask is not None and mask.shape[-2] > 1
    if of_queries and any(s.mask_row is not None for s in term.segments):
        return False
    constants = [x for pair in term.factors for x in pair if x is not None]
    constants += [s.shift for s in term.segments if isinstance(s.shift, Tensor)]
    constants += [] if mask is None else [mask]
    if any(x.requires_grad for x in constants) or q.shape[-1] > WIDEST:
        return False
    stacks = [x.base for s in term.segments for x in (s.k, s.v)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *stacks))
    if term.factors and learns and not learns_ranked(q):
        return False
    alike = all(x.shape[-1] == q.shape[-1] and x.dtype == q.dtype for x in stacks)
    return alike and all(keys.shape[0] <= own.tokens for _, keys in term.factors)


# -- equal probabilities, regions, maps ------------------------------------------------------------


def _suits_others(call: AttentionCall, finished: Sum) -> str | None:
    """Why a call is faster by a kernel of its own; None where it is not."""
    device, keys = call.q.device, call.k.shape[-2]
    most = max((len(rows) for rows in _sharing(finished, range(finished.rows)).values()), default=0)
    if wins(SHARED, device, most, keys):
        return f"{most} rows of one softmax: its products are formed once"
    kinds = max(
        (t.regions.kinds for ts in finished.terms.values() for t in ts if t.regions), default=0
    )
    if wins(REGIONS, device, kinds, keys):
        return f"{kinds} kinds of queries by region: one launch, no mask and nothing gathered"
    return None


def _sharing(finished: Sum, rows: Sequence[int]) -> dict[tuple[Any, ...], list[int]]:
    """Rows whose one softmax is the same, two or more of each.

    Keys: what q, k and v are rows of, the scale; then the rows of q and k.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        term, *others = finished.terms[row]
        if not others and is_bare(term, finished.mask):
            q, k, v = term.q, term.own.k, term.own.v
            key = (id(q.base), id(k.base), id(v.base), term.scale, q.row, k.row)
            found.setdefault(key, []).append(row)
    return {key: alike for key, alike in found.items() if len(alike) > 1}


def _shared(finished: Sum, rows: Sequence[int]) -> tuple[list[Piece], list[int]]:
    """The rows that share their probabilities, one launch for each choice of stacks; the rest."""
    from hookctl.kernels.shared_probabilities import Group, shared_probabilities

    launches: dict[tuple[Any, ...], list[list[int]]] = {}
    for key, alike in _sharing(finished, rows).items():
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


def is_bare(term: Term, mask: Tensor | None) -> bool:
    """Whether a term is a softmax of q and k alone over values as they are."""
    return term.bare and (mask is None or term.own.mask_row is None)


def attend(scores: Scores, v: Tensor, regions: KeyRegions | None = None) -> Tensor:
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
