"""Gradients of the sum of terms, by recomputation and without atomics.

With P_j the probabilities, w_j the weight of a query and dO the gradient of the output row:

    dV = sum of P_j^T (w_j dO)                   dP = dO V^T
    dS = P_j * (w_j dP - d_j)                    d_j = w_j rowsum(P_j * dP) - dlse_j
    dQ = scale * sum of dS K                     dK = scale * sum of dS^T Q

Each program owns a tile of the gradient of one source row and walks over every step that used it,
so that the sum has one order. Probabilities come back from the log-sum-exp of the forward.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
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
from hookctl.kernels.common.launch import INTERPRETED, WIDTHS, Specimen, pieces
from hookctl.kernels.common.launch_tables import KEYS, QUERIES, RANKED, entry, needed, tile_for
from hookctl.kernels.common.stretches import Tables
from hookctl.kernels.common.tiles import (
    LOG2E,
    add_products,
    biased,
    nothing,
    parts,
    per_query,
    place,
    products,
    store,
)

_COLUMNS = tl.constexpr(stretches.COLUMNS)
_K, _V, _KEYS = (tl.constexpr(c) for c in (stretches.K, stretches.V, stretches.KEYS))
_ROW, _TERM, _CLOSES = (tl.constexpr(c) for c in (stretches.ROW, stretches.TERM, stretches.CLOSES))
_WEIGHT, _BIAS = tl.constexpr(stretches.WEIGHT), tl.constexpr(stretches.BIAS)


@triton.jit
def _pivot(lse, step, m, tokens):
    """What base-2 scores are measured from; a query beyond the end gets probabilities of 0."""
    at = (tl.load(step + _TERM) * tl.num_programs(1) + tl.program_id(1)) * tokens
    found = tl.load(lse + at + m, mask=m < tokens, other=float("inf")) * LOG2E
    return tl.where(found == float("-inf"), 0.0, found), at


@triton.jit
def _rowsums(
    q0, q1, q2, k0, k1, k2, v0, v1, v2, gradient, lse, lse_gradient, rowsums, offsets,
    steps, numbers, starts, weights, bias, query_factors, key_factors,
    tokens, heads, scale, o_row, o_sub, o_head, o_token,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """rowsum(P_j * dP) of every term, which is also the gradient of its weight, and d_j."""
    row = tl.program_id(2).to(tl.int64)
    sub = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    gradient += row * o_row + sub * o_sub + head * o_head
    g_0, g_1 = parts(gradient, o_token, 1, m, tokens, D, D0, D1, ALIGN)
    total = tl.zeros([BM], tl.float32)
    for s in range(tl.load(starts + row), tl.load(starts + row + 1)):
        step = steps + s * _COLUMNS
        q, q_t, q_c = place(step, q0, q1, q2, sub, head, ALIGN)
        k, k_t, k_c = place(step + _K, k0, k1, k2, sub, head, ALIGN)
        v, v_t, v_c = place(step + _V, v0, v1, v2, sub, head, ALIGN)
        keys = tl.load(step + _KEYS).to(tl.int32)
        shift = tl.load(numbers + 2 * s + 1)
        q_0, q_1 = parts(q, q_t, q_c, m, tokens, D, D0, D1, ALIGN)
        pivot, at = _pivot(lse, step, m, tokens)
        for first in range(0, keys, BN):
            n = first + tl.arange(0, BN)
            scores = products(q_0, q_1, k, k_t, k_c, n, keys, D, D0, D1, ALIGN, UPCAST)
            scores = biased(
                scores * (scale * LOG2E), step + _BIAS, shift, bias, query_factors, key_factors,
                sub, head, m, n, tokens, keys, False, BIASED, RANK, UPCAST,
            )  # fmt: skip
            dp = products(g_0, g_1, v, v_t, v_c, n, keys, D, D0, D1, ALIGN, UPCAST)
            total += tl.sum(tl.exp2(scores - pivot[:, None]) * dp, 1)
        if tl.load(step + _CLOSES) != 0:
            w = tl.load(numbers + 2 * s)
            if WEIGHTED:
                w *= per_query(weights, tl.load(step + _WEIGHT), m, tokens)
            tl.store(rowsums + at + m, total, mask=m < tokens)
            d = w * total - tl.load(lse_gradient + at + m, mask=m < tokens, other=0.0)
            tl.store(offsets + at + m, d, mask=m < tokens)
            total = tl.zeros([BM], tl.float32)


@triton.jit
def _overlaps(
    gradient, out, lse_gradient, offsets, tokens, heads, o_row, o_sub, o_head, o_token,
    x_row, x_sub, x_head, x_token,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """d_j where every row has one term: there w_j rowsum(P_j * dP) is rowsum(O * dO)."""
    row = tl.program_id(2).to(tl.int64)
    sub = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    gradient += row * o_row + sub * o_sub + head * o_head
    out += row * x_row + sub * x_sub + head * x_head
    g_0, g_1 = parts(gradient, o_token, 1, m, tokens, D, D0, D1, ALIGN)
    x_0, x_1 = parts(out, x_token, 1, m, tokens, D, D0, D1, ALIGN)
    total = tl.sum(g_0.to(tl.float32) * x_0.to(tl.float32), 1)
    if D1:
        total += tl.sum(g_1.to(tl.float32) * x_1.to(tl.float32), 1)
    at = (row * tl.num_programs(1) + tl.program_id(1)) * tokens + m
    total -= tl.load(lse_gradient + at, mask=m < tokens, other=0.0)
    tl.store(offsets + at, total, mask=m < tokens)


@triton.jit
def _queries(
    q0, q1, q2, k0, k1, k2, v0, v1, v2, gradient, lse, offsets, dq0, dq1, dq2,
    steps, numbers, sources, starts, users, weights, bias, query_factors, key_factors,
    tokens, heads, scale, o_row, o_sub, o_head, o_token,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of one row of queries. offsets: d_j."""
    source = tl.program_id(2).to(tl.int64)
    sub = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    acc_0, acc_1 = nothing(BM, D0, D1)
    for user in range(tl.load(starts + source), tl.load(starts + source + 1)):
        s = tl.load(users + user)
        step = steps + s * _COLUMNS
        q, q_t, q_c = place(step, q0, q1, q2, sub, head, ALIGN)
        k, k_t, k_c = place(step + _K, k0, k1, k2, sub, head, ALIGN)
        v, v_t, v_c = place(step + _V, v0, v1, v2, sub, head, ALIGN)
        g = gradient + tl.load(step + _ROW) * o_row + sub * o_sub + head * o_head
        keys = tl.load(step + _KEYS).to(tl.int32)
        w, shift = tl.load(numbers + 2 * s), tl.load(numbers + 2 * s + 1)
        q_0, q_1 = parts(q, q_t, q_c, m, tokens, D, D0, D1, ALIGN)
        g_0, g_1 = parts(g, o_token, 1, m, tokens, D, D0, D1, ALIGN)
        pivot, at = _pivot(lse, step, m, tokens)
        d = tl.load(offsets + at + m, mask=m < tokens, other=0.0)
        if WEIGHTED:
            w *= per_query(weights, tl.load(step + _WEIGHT), m, tokens)[:, None]
        for first in range(0, keys, BN):
            n = first + tl.arange(0, BN)
            scores = products(q_0, q_1, k, k_t, k_c, n, keys, D, D0, D1, ALIGN, UPCAST)
            scores = biased(
                scores * (scale * LOG2E), step + _BIAS, shift, bias, query_factors, key_factors,
                sub, head, m, n, tokens, keys, False, BIASED, RANK, UPCAST,
            )  # fmt: skip
            dp = products(g_0, g_1, v, v_t, v_c, n, keys, D, D0, D1, ALIGN, UPCAST)
            ds = tl.exp2(scores - pivot[:, None]) * (w * dp - d[:, None])
            acc_0, acc_1 = add_products(
                acc_0, acc_1, ds, k, k_t, k_c, n, keys, D, D0, D1, ALIGN, UPCAST
            )
    at_source = sources + 3 * source
    stack = tl.load(at_source)
    out = tl.where(stack == 0, dq0, tl.where(stack == 1, dq1, dq2)) + tl.load(at_source + 1)
    out += tl.program_id(1).to(tl.int64) * tokens * D
    store(out, D, m, tokens, acc_0 * scale, acc_1 * scale, D, D0, D1)


@triton.jit
def _keys(
    q0, q1, q2, k0, k1, k2, v0, v1, v2, gradient, lse, offsets, dx0, dx1, dx2,
    steps, numbers, sources, starts, users, weights, bias, query_factors, key_factors,
    tokens, heads, scale, o_row, o_sub, o_head, o_token,
    VALUES: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dK, or dV where VALUES, of a tile of one row of keys. Everything stands transposed."""
    source = sources + 3 * tl.program_id(2)
    sub = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc_0, acc_1 = nothing(BN, D0, D1)
    user_starts = starts + tl.program_id(2)
    for user in range(tl.load(user_starts), tl.load(user_starts + 1)):
        s = tl.load(users + user)
        step = steps + s * _COLUMNS
        q, q_t, q_c = place(step, q0, q1, q2, sub, head, ALIGN)
        k, k_t, k_c = place(step + _K, k0, k1, k2, sub, head, ALIGN)
        v, v_t, v_c = place(step + _V, v0, v1, v2, sub, head, ALIGN)
        g = gradient + tl.load(step + _ROW) * o_row + sub * o_sub + head * o_head
        keys = tl.load(step + _KEYS).to(tl.int32)
        number, shift = tl.load(numbers + 2 * s), tl.load(numbers + 2 * s + 1)
        k_0, k_1 = parts(k, k_t, k_c, n, keys, D, D0, D1, ALIGN)
        if not VALUES:
            v_0, v_1 = parts(v, v_t, v_c, n, keys, D, D0, D1, ALIGN)
        for first in range(0, tokens, BM):
            m = first + tl.arange(0, BM)
            scores = products(k_0, k_1, q, q_t, q_c, m, tokens, D, D0, D1, ALIGN, UPCAST)
            scores = biased(
                scores * (scale * LOG2E), step + _BIAS, shift, bias, query_factors, key_factors,
                sub, head, m, n, tokens, keys, True, BIASED, RANK, UPCAST,
            )  # fmt: skip
            pivot, at = _pivot(lse, step, m, tokens)
            p = tl.exp2(scores - pivot[None, :])
            w = number
            if WEIGHTED:
                w = number * per_query(weights, tl.load(step + _WEIGHT), m, tokens)[None, :]
            if VALUES:
                acc_0, acc_1 = add_products(
                    acc_0, acc_1, p * w, g, o_token, 1, m, tokens, D, D0, D1, ALIGN, UPCAST
                )
            else:
                dp = products(v_0, v_1, g, o_token, 1, m, tokens, D, D0, D1, ALIGN, UPCAST)
                d = tl.load(offsets + at + m, mask=m < tokens, other=0.0)
                acc_0, acc_1 = add_products(
                    acc_0, acc_1, p * (w * dp - d[None, :]),
                    q, q_t, q_c, m, tokens, D, D0, D1, ALIGN, UPCAST,
                )  # fmt: skip
    stack, length = tl.load(source), tl.load(source + 2)
    out = tl.where(stack == 0, dx0, tl.where(stack == 1, dx1, dx2)) + tl.load(source + 1)
    out += tl.program_id(1).to(tl.int64) * length * D
    if not VALUES:
        acc_0 *= scale
        acc_1 *= scale
    store(out, D, n, length, acc_0, acc_1, D, D0, D1)


_OWNED = {"sources": "*i64:16", "starts": "*i32:16", "users": "*i32:16"}
_PLAIN = {"lse": "*fp32:16", "offsets": "*fp32:16", "weights": None, "WEIGHTED": False}
_FULL = _PLAIN | {"weights": "*fp32:16", "WEIGHTED": True, "bias": "*fp32:16", "BIASED": True}


def gradients(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    extras: Extras,
    t: Tables,
    scale: float,
    out: Tensor,
    lse: Tensor,
    gradient: Tensor,
    lse_gradient: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradient of each stack of q, k and v and of the weights; empty where it is not wanted."""
    if gradient.stride(-1) != 1:
        gradient = gradient.contiguous()
    arguments = fixed(q[0], extras, t, scale) | out_strides(gradient)
    arguments |= pointers(q, k, v, extras) | alignment(*q, *k, *v, gradient, out)
    key = arguments["D0"], arguments["D1"]
    arguments |= {"gradient": gradient, "lse": lse, "weights": extras.weights}
    arguments |= {"WEIGHTED": extras.weights is not None}
    ranked_by = RANKED if extras.key_factors is not None else ""
    of_queries, of_keys = QUERIES + ranked_by, KEYS + ranked_by
    tile = needed(tile_for(of_queries, key, q[0]), of_queries, q[0])
    key_tile = needed(tile_for(of_keys, key, q[0]), of_keys, q[0])
    by_queries = arguments | tile.sides | tile.options
    by_keys = arguments | key_tile.sides | key_tile.options
    lse_gradient = lse_gradient.contiguous()
    of_weights = extras.weights is not None and wanted[-1]
    _, sub, heads, n, _ = q[0].shape
    found: list[Tensor] = []
    with torch.cuda.device_of(q[0]):
        offsets = torch.empty_like(lse)
        rowsums = torch.empty_like(lse) if of_weights or not t.single else None
        grid = triton.cdiv(n, tile.block_m), sub * heads, out.shape[0]
        if rowsums is None:
            _overlaps[grid](**_of_out(by_queries, out), lse_gradient=lse_gradient, offsets=offsets)
        else:
            _rowsums[grid](
                **by_queries,
                lse_gradient=lse_gradient,
                rowsums=rowsums,
                offsets=offsets,
                starts=t.starts,
            )
        for which, stacks in enumerate((q, k, v)):
            of_kind = tuple(wanted[len(found) : len(found) + len(stacks)])
            chosen = (by_keys if which else by_queries) | {"offsets": offsets}
            found += _of_stacks(which, stacks, of_kind, chosen, t)
    if extras.weights is not None:
        found.append(_of_weights(extras.weights, rowsums, t) if of_weights else lse.new_empty(0))
    return found


def _of_out(arguments: dict[str, Any], out: Tensor) -> dict[str, Any]:
    """The arguments of `_overlaps`."""
    names = ["gradient", "tokens", "heads", "o_row", "o_sub", "o_head", "o_token", "D", "D0", "D1"]
    names += ["BM", "ALIGN", *INTERPRETED.options]
    strides = zip(("x_row", "x_sub", "x_head", "x_token"), out.stride(), strict=False)
    return {name: arguments[name] for name in names} | dict(strides) | {"out": out}


def _of_stacks(
    which: int,
    stacks: Sequence[Tensor],
    wanted: tuple[bool, ...],
    arguments: dict[str, Any],
    t: Tables,
) -> list[Tensor]:
    """The gradients of the stacks of q (0), k (1) or v (2). Rows that nothing used get zeros."""
    found = [
        x.new_zeros(x.shape) if w else x.new_empty(0) for x, w in zip(stacks, wanted, strict=True)
    ]
    users = t.users(which, wanted)
    if not users.rows:
        return found
    _, sub, heads, _, _ = stacks[0].shape
    tokens = max(x.shape[-2] for x in stacks)
    kernel: Any = _queries if which == 0 else _keys
    prefix, block = ("dq", arguments["BM"]) if which == 0 else ("dx", arguments["BN"])
    padded = [*found, *[found[0]] * (stretches.STACKS - len(found))]
    values = {} if which == 0 else {"VALUES": which == 2}
    kernel[triton.cdiv(tokens, block), sub * heads, users.rows](
        **arguments,
        **values,
        **{f"{prefix}{i}": x for i, x in enumerate(padded)},
        sources=users.sources,
        starts=users.starts,
        users=users.steps,
    )
    return found


def _of_weights(weights: Tensor, rowsums: Tensor | None, t: Tables) -> Tensor:
    """[W, N]: a weight multiplies all heads, and may serve several terms."""
    assert rowsums is not None  # they are made whenever weights learn
    found = torch.zeros_like(weights)
    for term, (_, number, row) in zip(rowsums, t.terms, strict=True):
        if row >= 0:
            found[row] += number * term.sum((0, 1))
    return found


def specimens(arch: str) -> Iterator[Specimen]:
    """What ships for an architecture: plain, and with all that a row may have in bf16 and fp32."""
    of_terms = {"lse_gradient": "*fp32:16", "rowsums": "*fp32:16", "starts": "*i32:16"}
    kinds: tuple[tuple[str, Any, str, dict[str, Any]], ...] = (
        ("rowsums", _rowsums, QUERIES, of_terms),
        ("dQ", _queries, QUERIES, _OWNED),
        ("dK", _keys, KEYS, _OWNED | {"VALUES": False}),
        ("dV", _keys, KEYS, _OWNED | {"VALUES": True}),
    )
    for d in WIDTHS:
        for name, kernel, table, own in kinds:
            plain = [(element, _PLAIN) for element in ("fp16", "fp32")]
            full = [(element, _FULL | ranked(element)) for element in ("bf16", "fp32")]
            for element, more in (*plain, *full):
                ranked_by = RANKED if "RANK" in more else ""
                tile = entry(table + ranked_by, arch, pieces(d), element)
                if tile is not None:
                    given = form(element, d) | own | more | {"gradient": f"*{element}:16"}
                    given |= tile.sides
                    found = [x for x in kernel.arg_names if x[:2] in ("dq", "dx")]
                    given |= dict.fromkeys(found, f"*{element}:16")
                    at = f"sum of terms, {name}{ranked_by}, {element}, {d}"
                    yield Specimen(at, kernel, given, tile, arch, dots=element != "fp32")
        yield from _of_overlaps(arch, d)


def _of_overlaps(arch: str, d: int) -> Iterator[Specimen]:
    strides = dict.fromkeys(("x_row", "x_sub", "x_head", "x_token"), "i32:16")
    for element in ("fp16", "bf16", "fp32"):
        tile = entry(QUERIES, arch, pieces(d), element)
        if tile is not None:
            common = form(element, d) | tile.sides
            given = {name: x for name, x in common.items() if name in _overlaps.arg_names} | strides
            given |= dict.fromkeys(("gradient", "out"), f"*{element}:16")
            given |= dict.fromkeys(("lse_gradient", "offsets"), "*fp32:16")
            name = f"sum of terms, overlaps, {element}, {d}"
            yield Specimen(name, _overlaps, given, tile, arch, dots=False)
