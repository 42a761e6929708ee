"""Edits of one attention call, each in the forms that it can be had: through the engine, as the
official code does it (explicit matrices, edited in place), and by SDPA put together by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.rows import COND, UNCOND, Row, Rows
from hookctl.attention.call import AttentionCall
from hookctl.attention.token_map import Routing

Form = Callable[[Tensor, Tensor, Tensor], Tensor]

TEXT = 77
IMAGE_TOKENS = 16  # of a decoupled adapter
ADAPTER_SCALE = 0.6
BRANCHES = (UNCOND, COND)  # of every batch here, in this order


def rows_of(edits: int = 1) -> Rows:
    """A source and its edits, guided: row (1 + edits) + p is prompt p with its text."""
    prompts = range(1 + edits)
    named = [(branch, prompt) for branch in BRANCHES for prompt in prompts]
    return Rows([Row(i, branch, prompt, 0) for i, (branch, prompt) in enumerate(named)])


@dataclass(frozen=True, eq=False)
class Edit:
    """What a kind of edit does in each form. Tensors are [rows, heads, tokens, channels].

    apply: the verbs; explicit: from (q, k, v), by matrices edited in place, where q may hold the
    `sampled` queries alone; by_hand: from (q, k, v), by calls of SDPA; hand: the name of that form;
    keys: tokens of the keys, None for as many as queries; work: products with a matrix of the call,
    as a share of what the plain call does; bits: of the tokens, if there are regions.
    """

    apply: Callable[[AttentionCall], None]
    explicit: Form
    by_hand: Form
    hand: str = "sdpa per term"
    keys: int | None = TEXT
    work: float = 1.0
    bits: Tensor | None = None


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """[rows, heads, N, M], as the official code makes them: heads in the batch."""
    flat, keys = q.flatten(0, 1), k.flatten(0, 1)
    unread = flat.new_empty(flat.shape[0], flat.shape[1], keys.shape[1])
    scores = torch.baddbmm(unread, flat, keys.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    return scores.view(*q.shape[:2], *scores.shape[1:])


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1)


def weigh(p: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(*p.shape[:3], -1)


def self_replacement(edits: int = 1) -> Edit:
    """P2P's self-replacement of every edit by the source, with guidance."""
    source = 1 + edits
    targets = range(source + 1, 2 * source)

    def apply(call: AttentionCall) -> None:
        call.borrow(targets, q=source, k=source)

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = probabilities(q, k)
        p[source + 1 :] = p[source]
        return weigh(p, v)

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mine, shared = slice(0, source + 1), slice(source, source + 1)
        q, k = (torch.cat([x[mine], *[x[shared]] * edits]) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v)

    # Rows that share a matrix need its scores once.
    return Edit(apply, explicit, by_hand, keys=None, work=1 - 0.5 * edits / (2 + 2 * edits))


def token_edit(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token map, blend and gain of a typical replacement, refinement or re-weighting."""
    token_map, blend, gain = torch.eye(TEXT), torch.ones(TEXT), torch.ones(TEXT)
    if kind == "replace":
        token_map[5, 5:7] = 0.5
    elif kind == "refine":
        index = torch.arange(TEXT)
        index[8:] -= 3
        token_map = torch.zeros(TEXT, TEXT)
        token_map[index, torch.arange(TEXT)] = 1
        blend[5:8] = 0
    else:
        gain[5] = 3.0
    return token_map, blend, gain


def cross(kind: str, device: torch.device) -> Edit:
    """P2P's edits of the text's map: replace, refine, reweight; row 3 from row 2."""
    given = token_edit(kind)
    # As recipes have it: on the CPU, where the engine looks at what it is.
    routing = Routing.of(TEXT, None if kind == "reweight" else given[0], *given[1:])
    token_map, blend, gain = (x.to(device) for x in given)
    index = token_map.argmax(0)

    def apply(call: AttentionCall) -> None:
        call.route_by(3, 2, routing)

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = probabilities(q, k)
        if kind == "replace":
            p[3] = torch.einsum("hpw,wn->hpn", p[2], token_map.to(p))
        elif kind == "refine":
            p[3] = p[2][:, :, index] * blend.to(p) + (1 - blend).to(p) * p[3]
        else:
            p[3] = p[2] * gain.to(p)
        return weigh(p, v)

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:2], q.shape[2], v.shape[-1])
        out[:3] = F.scaled_dot_product_attention(q[:3], k[:3], v[:3])
        moved = (token_map * (blend * gain)).to(v) @ v[3:]
        out[3:] = F.scaled_dot_product_attention(q[2:3], k[2:3], moved)
        if kind == "refine":
            own = v[3:] * ((1 - blend) * gain).to(v)[:, None]
            out[3:] += F.scaled_dot_product_attention(q[3:], k[3:], own)
        return out

    return Edit(apply, explicit, by_hand)


def adapter(heads: int, channels: int, device: torch.device, dtype: torch.dtype) -> Edit:
    """Decoupled cross-attention: a second softmax over an adapter's own tokens, on every row."""
    generator = torch.Generator().manual_seed(7)
    size = (heads, IMAGE_TOKENS, channels)
    k_new, v_new = (
        torch.randn(size, generator=generator).to(device, dtype).contiguous() for _ in range(2)
    )

    def apply(call: AttentionCall) -> None:
        call.add(call.rows, k_new, v_new, scale=ADAPTER_SCALE)

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_all, v_all = (x.to(q).expand(q.shape[0], *size) for x in (k_new, v_new))
        own = weigh(probabilities(q, k), v)
        return own.add_(weigh(probabilities(q, k_all), v_all), alpha=ADAPTER_SCALE)

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_all, v_all = (x.expand(q.shape[0], *size) for x in (k_new, v_new))
        added = F.scaled_dot_product_attention(q, k_all, v_all)
        return F.scaled_dot_product_attention(q, k, v).add_(added, alpha=ADAPTER_SCALE)

    return Edit(apply, explicit, by_hand, work=1 + IMAGE_TOKENS / TEXT)


def regions_of(tokens: int, count: int, cover: float) -> Tensor:
    """Bit sets of a square grid with `count` instances side by side covering part of it.

    A token outside of all is of the background, bit 63.
    """
    side = round(tokens**0.5)
    place = torch.arange(tokens)
    row, column = place // side, place % side
    inside = row < round(side * cover)
    which = (column * count // side).clamp_max(count - 1)
    bits = torch.ones(tokens, dtype=torch.int64) << which
    return torch.where(inside, bits, torch.tensor(-(1 << 63)))


def density(bits: Tensor) -> float:
    """The share of pairs of tokens that see each other."""
    _, counts = bits.unique(return_counts=True)
    return float((counts.double() / len(bits)).square().sum())


def guided(x: Tensor) -> slice:
    """The conditional rows of a batch whose branches are `BRANCHES`, in this order."""
    each = x.shape[0] // len(BRANCHES)
    at = BRANCHES.index(COND) * each
    return slice(at, at + each)


def masked(bits: Tensor, device: torch.device) -> Edit:
    """Self-attention of the guided rows within regions; bits are on the CPU, as recipes have it."""
    there = bits.to(device)
    allowed = (there[:, None] & there[None]) != 0

    def apply(call: AttentionCall) -> None:
        call.restrict(call.rows.where(branch=COND), bits, bits)

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k)
        here = allowed if q.shape[2] == len(bits) else allowed[sampled(len(bits), q.shape[2])]
        scores[guided(q)].masked_fill_(~here, float("-inf"))
        return weigh(scores.softmax(-1), v)

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        here = guided(q)
        rest = slice(0, here.start)
        plain = F.scaled_dot_product_attention(q[rest], k[rest], v[rest])
        inside = F.scaled_dot_product_attention(q[here], k[here], v[here], attn_mask=allowed)
        return torch.cat([plain, inside])

    work = (1 + density(bits)) / 2
    return Edit(apply, explicit, by_hand, hand="dense mask", keys=None, work=work, bits=bits)


def sampled(tokens: int, count: int) -> Tensor:
    """Positions of the queries at which results are checked, spread over the grid."""
    return torch.linspace(0, tokens - 1, count).long()
