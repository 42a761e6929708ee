"""The forward kernels of the sum of terms and their launch.

`_long` walks over the keys with an online softmax (Dao, arXiv 2307.08691). `_short` holds the
whole softmax of up to 128 or 256 keys in registers and lets every term of a row add to one
accumulator: prompt-to-prompt edits and decoupled adapters in one pass.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.arguments import (
    Extras,
    alignment,
    fixed,
    form,
    out_strides,
    pointers,
    ranked,
)
from hookctl.kernels.common.guard import constexpr, jit, tl
from hookctl.kernels.common.launch import WIDTHS, Launch, Specimen, cdiv, pieces
from hookctl.kernels.common.launch_tables import RANKED, SHORT, entry, needed, short_form, tile_for
from hookctl.kernels.common.stretches import Tables
from hookctl.kernels.common.tiles import (
    LOG2E,
    add_biases,
    add_products,
    load_parts,
    load_weights,
    products,
    row_pointer,
    store_parts,
    zero_parts,
)

_COLUMNS = constexpr(stretches.COLUMNS)
_K, _V, _KEYS = (constexpr(c) for c in (stretches.K, stretches.V, stretches.KEYS))
_TERM, _CLOSES = constexpr(stretches.TERM), constexpr(stretches.CLOSES)
_WEIGHT, _BIAS = constexpr(stretches.WEIGHT), constexpr(stretches.BIAS)


@jit
def _close(
    stretch, number, top, norm, lse, weights, m, tokens,
    WEIGHTED: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """What the accumulator of a finished softmax is multiplied by; its log-sum-exp is kept."""
    if LSE:
        at = tl.load(stretch + _TERM) * tl.num_programs(1) + tl.program_id(1)
        tl.store(lse + at * tokens + m, (top + tl.log2(norm)) / LOG2E, mask=m < tokens)
    gain = tl.where(norm > 0, tl.load(number) / norm, 0.0)
    if WEIGHTED:
        gain *= load_weights(weights, tl.load(stretch + _WEIGHT), m, tokens)
    return gain[:, None]


@jit
def _long(
    q0, q1, q2, k0, k1, k2, v0, v1, v2, out, lse,
    cells, numbers, starts, weights, bias, query_factors, key_factors,
    tokens, heads, scale, o_row, o_sub, o_head, o_token,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, SINGLE: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    RANK: tl.constexpr, LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head of one output row, over all its terms.

    SINGLE: every row has one term, and needs no sum beside the accumulator.
    """
    row = tl.program_id(2).to(tl.int64)
    sub = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    out += row * o_row + sub * o_sub + head * o_head
    acc_0, acc_1 = zero_parts(BM, D0, D1)
    if not SINGLE:
        sum_0, sum_1 = zero_parts(BM, D0, D1)
    top = tl.full([BM], float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    last = tl.load(starts + row + 1)
    for s in range(tl.load(starts + row), last):
        stretch = cells + s * _COLUMNS
        q, q_t, q_c = row_pointer(stretch, q0, q1, q2, sub, head, ALIGN)
        k, k_t, k_c = row_pointer(stretch + _K, k0, k1, k2, sub, head, ALIGN)
        v, v_t, v_c = row_pointer(stretch + _V, v0, v1, v2, sub, head, ALIGN)
        keys = tl.load(stretch + _KEYS).to(tl.int32)
        shift = tl.load(numbers + 2 * s + 1)
        q_0, q_1 = load_parts(q, q_t, q_c, m, tokens, D, D0, D1, ALIGN)
        for first in range(0, keys, BN):
            n = first + tl.arange(0, BN)
            scores = products(q_0, q_1, k, k_t, k_c, n, keys, D, D0, D1, ALIGN, UPCAST)
            scores = add_biases(
                scores * (scale * LOG2E), stretch + _BIAS, shift, bias, query_factors, key_factors,
                sub, head, m, n, tokens, keys, False, BIASED, RANK, UPCAST,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(scores, 1))
            # A row without any key so far keeps a finite pivot, so that nothing becomes NaN.
            pivot = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(scores - pivot[:, None])
            fade = tl.exp2(top - pivot)
            norm = norm * fade + tl.sum(p, 1)
            acc_0, acc_1 = add_products(
                acc_0 * fade[:, None], acc_1 * fade[:, None], p,
                v, v_t, v_c, n, keys, D, D0, D1, ALIGN, UPCAST,
            )  # fmt: skip
            top = new
        if not SINGLE:
            if tl.load(stretch + _CLOSES) != 0:
                gain = _close(
                    stretch, numbers + 2 * s, top, norm, lse, weights, m, tokens, WEIGHTED, LSE
                )
                sum_0 += acc_0 * gain
                sum_1 += acc_1 * gain
                acc_0, acc_1 = zero_parts(BM, D0, D1)
                top = tl.full([BM], float("-inf"), tl.float32)
                norm = tl.zeros([BM], tl.float32)
    if SINGLE:
        stretch = cells + (last - 1) * _COLUMNS
        number = numbers + 2 * (last - 1)
        gain = _close(stretch, number, top, norm, lse, weights, m, tokens, WEIGHTED, LSE)
        sum_0 = acc_0 * gain
        sum_1 = acc_1 * gain
    store_parts(out, o_token, m, tokens, sum_0, sum_1, D, D0, D1)


@jit
def _short(
    q0, q1, q2, k0, k1, k2, v0, v1, v2, out, lse,
    cells, numbers, starts, weights, bias, query_factors, key_factors,
    tokens, heads, scale, o_row, o_sub, o_head, o_token,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RANK: tl.constexpr,
    LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `_long`, each softmax over one stretch of at most BN keys."""
    row = tl.program_id(2).to(tl.int64)
    sub = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    out += row * o_row + sub * o_sub + head * o_head
    sum_0, sum_1 = zero_parts(BM, D0, D1)
    for s in range(tl.load(starts + row), tl.load(starts + row + 1)):
        stretch = cells + s * _COLUMNS
        q, q_t, q_c = row_pointer(stretch, q0, q1, q2, sub, head, ALIGN)
        k, k_t, k_c = row_pointer(stretch + _K, k0, k1, k2, sub, head, ALIGN)
        v, v_t, v_c = row_pointer(stretch + _V, v0, v1, v2, sub, head, ALIGN)
        keys = tl.load(stretch + _KEYS).to(tl.int32)
        q_0, q_1 = load_parts(q, q_t, q_c, m, tokens, D, D0, D1, ALIGN)
        scores = products(q_0, q_1, k, k_t, k_c, n, keys, D, D0, D1, ALIGN, UPCAST)
        scores = add_biases(
            scores * (scale * LOG2E), stretch + _BIAS, tl.load(numbers + 2 * s + 1), bias,
            query_factors, key_factors, sub, head, m, n, tokens, keys, False, BIASED, RANK, UPCAST,
        )  # fmt: skip
        top = tl.max(scores, 1)
        p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        norm = tl.sum(p, 1)
        gain = _close(stretch, numbers + 2 * s, top, norm, lse, weights, m, tokens, WEIGHTED, LSE)
        sum_0, sum_1 = add_products(
            sum_0, sum_1, p * gain, v, v_t, v_c, n, keys, D, D0, D1, ALIGN, UPCAST
        )
    store_parts(out, o_token, m, tokens, sum_0, sum_1, D, D0, D1)


_ONE, _SEVERAL = "sum of terms, one term", "sum of terms, several terms"


def forward(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    extras: Extras,
    t: Tables,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill `out` [rows, sub-batch, heads, N, channels] and `lse` [terms, sub-batch, heads, N]."""
    kernel, tile, sizes = _chosen(q[0], k, t)
    rows, sub, heads, n, _ = out.shape
    with torch.cuda.device_of(out):
        kernel[cdiv(n, tile.block_m), sub * heads, rows](
            **fixed(q[0], extras, t, scale),
            **pointers(q, k, v, extras),
            **alignment(*q, *k, *v),
            **out_strides(out),
            **sizes,
            **tile.options,
            starts=t.starts,
            weights=extras.weights,
            out=out,
            lse=lse,
            WEIGHTED=extras.weights is not None,
            LSE=lse is not None,
        )


def _chosen(q: Tensor, k: Sequence[Tensor], t: Tables) -> tuple[Any, Launch, dict[str, Any]]:
    """The kernel, its tile, and what else it is compiled for."""
    if all(s.closes for s in t.stretches):
        held = short_form(q, max(x.shape[-2] for x in k))
        if held:
            return _short, held[1], {"BM": held[1].block_m, "BN": held[0]}
    table = _ONE if t.single else _SEVERAL
    tile = needed(tile_for(table, pieces(q.shape[-1]), q), table, q)
    return _long, tile, tile.sides | {"SINGLE": t.single}


_NONE = {"weights": None, "lse": None, "WEIGHTED": False, "LSE": False}
_FULL = {"weights": "*fp32:16", "lse": "*fp32:16", "bias": "*fp32:16"} | dict.fromkeys(
    ("WEIGHTED", "LSE", "BIASED"), True
)


def specimens(arch: str) -> Iterator[Specimen]:
    """What ships for an architecture: plain, with all that a row may have, in bf16 and fp32 with
    rank-r biases as well."""
    for d in WIDTHS:
        for table, options in ((_ONE, _NONE), (_SEVERAL, _FULL)):
            sizes = {"SINGLE": table == _ONE}
            yield from _specimens(arch, table, _long, d, options | sizes)
        for table in SHORT.values():
            yield from _specimens(arch, table, _short, d, _FULL)


def _specimens(
    arch: str, table: str, kernel: Any, d: int, options: dict[str, Any]
) -> Iterator[Specimen]:
    for element in ("fp16", "bf16", "fp32"):
        tile = entry(table, arch, pieces(d), element)
        if tile is None:
            continue
        more = ranked(element) if options["LSE"] and element != "fp16" else {}
        given = form(element, d) | {"out": f"*{element}:16", "starts": "*i32:16"}
        given |= options | more | tile.sides
        name = f"{table}{RANKED if more else ''}, {element}, {d}"
        yield Specimen(name, kernel, given, tile, arch, dots=element != "fp32")
