"""Gradients of the sum of terms, by recomputation and without atomics.

With P_j the probabilities, w_j the weight of a query and dO the gradient of the output row:

    dV = sum of P_j^T (w_j dO)                   dP = dO V^T
    dS = P_j * (w_j dP - d_j)                    d_j = w_j rowsum(P_j * dP) - dlse_j
    dQ = scale * sum of dS K                     dK = scale * sum of dS^T Q

Each program owns a tile of the gradient of one source row and walks over every stretch that used
it, so that the sum has one order. Probabilities come back from the log-sum-exp of the forward.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from hookctl.kernels.common import stretches
from hookctl.kernels.common.guard import constexpr, jit, tl
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
_ROW, _TERM, _CLOSES = (constexpr(c) for c in (stretches.ROW, stretches.TERM, stretches.CLOSES))
_WEIGHT, _BIAS = constexpr(stretches.WEIGHT), constexpr(stretches.BIAS)


@jit
def _pivot(lse, stretch, m, tokens):
    """What base-2 scores are measured from; a query beyond the end gets probabilities of 0."""
    at = (tl.load(stretch + _TERM) * tl.num_programs(1) + tl.program_id(1)) * tokens
    found = tl.load(lse + at + m, mask=m < tokens, other=float("inf")) * LOG2E
    return tl.where(found == float("-inf"), 0.0, found), at


@jit
def rowsums_kernel(
    q0, q1, q2, k0, k1, k2, v0, v1, v2, gradient, lse, lse_gradient, rowsums, offsets,
    cells, numbers, starts, weights, bias, query_factors, key_factors,
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
    g_0, g_1 = load_parts(gradient, o_token, 1, m, tokens, D, D0, D1, ALIGN)
    total = tl.zeros([BM], tl.float32)
    for s in range(tl.load(starts + row), tl.load(starts + row + 1)):
        stretch = cells + s * _COLUMNS
        q, q_t, q_c = row_pointer(stretch, q0, q1, q2, sub, head, ALIGN)
        k, k_t, k_c = row_pointer(stretch + _K, k0, k1, k2, sub, head, ALIGN)
        v, v_t, v_c = row_pointer(stretch + _V, v0, v1, v2, sub, head, ALIGN)
        keys = tl.load(stretch + _KEYS).to(tl.int32)
        shift = tl.load(numbers + 2 * s + 1)
        q_0, q_1 = load_parts(q, q_t, q_c, m, tokens, D, D0, D1, ALIGN)
        pivot, at = _pivot(lse, stretch, m, tokens)
        for first in range(0, keys, BN):
            n = first + tl.arange(0, BN)
            scores = products(q_0, q_1, k, k_t, k_c, n, keys, D, D0, D1, ALIGN, UPCAST)
            scores = add_biases(
                scores * (scale * LOG2E), stretch + _BIAS, shift, bias, query_factors, key_factors,
                sub, head, m, n, tokens, keys, False, BIASED, RANK, UPCAST,
            )  # fmt: skip
            dp = products(g_0, g_1, v, v_t, v_c, n, keys, D, D0, D1, ALIGN, UPCAST)
            total += tl.sum(tl.exp2(scores - pivot[:, None]) * dp, 1)
        if tl.load(stretch + _CLOSES) != 0:
            w = tl.load(numbers + 2 * s)
            if WEIGHTED:
                w *= load_weights(weights, tl.load(stretch + _WEIGHT), m, tokens)
            tl.store(rowsums + at + m, total, mask=m < tokens)
            d = w * total - tl.load(lse_gradient + at + m, mask=m < tokens, other=0.0)
            tl.store(offsets + at + m, d, mask=m < tokens)
            total = tl.zeros([BM], tl.float32)


@jit
def overlaps_kernel(
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
    g_0, g_1 = load_parts(gradient, o_token, 1, m, tokens, D, D0, D1, ALIGN)
    x_0, x_1 = load_parts(out, x_token, 1, m, tokens, D, D0, D1, ALIGN)
    total = tl.sum(g_0.to(tl.float32) * x_0.to(tl.float32), 1)
    if D1:
        total += tl.sum(g_1.to(tl.float32) * x_1.to(tl.float32), 1)
    at = (row * tl.num_programs(1) + tl.program_id(1)) * tokens + m
    total -= tl.load(lse_gradient + at, mask=m < tokens, other=0.0)
    tl.store(offsets + at, total, mask=m < tokens)


@jit
def queries_kernel(
    q0, q1, q2, k0, k1, k2, v0, v1, v2, gradient, lse, offsets, dq0, dq1, dq2,
    cells, numbers, sources, starts, users, weights, bias, query_factors, key_factors,
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
    acc_0, acc_1 = zero_parts(BM, D0, D1)
    for user in range(tl.load(starts + source), tl.load(starts + source + 1)):
        s = tl.load(users + user)
        stretch = cells + s * _COLUMNS
        q, q_t, q_c = row_pointer(stretch, q0, q1, q2, sub, head, ALIGN)
        k, k_t, k_c = row_pointer(stretch + _K, k0, k1, k2, sub, head, ALIGN)
        v, v_t, v_c = row_pointer(stretch + _V, v0, v1, v2, sub, head, ALIGN)
        g = gradient + tl.load(stretch + _ROW) * o_row + sub * o_sub + head * o_head
        keys = tl.load(stretch + _KEYS).to(tl.int32)
        w, shift = tl.load(numbers + 2 * s), tl.load(numbers + 2 * s + 1)
        q_0, q_1 = load_parts(q, q_t, q_c, m, tokens, D, D0, D1, ALIGN)
        g_0, g_1 = load_parts(g, o_token, 1, m, tokens, D, D0, D1, ALIGN)
        pivot, at = _pivot(lse, stretch, m, tokens)
        d = tl.load(offsets + at + m, mask=m < tokens, other=0.0)
        if WEIGHTED:
            w *= load_weights(weights, tl.load(stretch + _WEIGHT), m, tokens)[:, None]
        for first in range(0, keys, BN):
            n = first + tl.arange(0, BN)
            scores = products(q_0, q_1, k, k_t, k_c, n, keys, D, D0, D1, ALIGN, UPCAST)
            scores = add_biases(
                scores * (scale * LOG2E), stretch + _BIAS, shift, bias, query_factors, key_factors,
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
    store_parts(out, D, m, tokens, acc_0 * scale, acc_1 * scale, D, D0, D1)


@jit
def keys_kernel(
    q0, q1, q2, k0, k1, k2, v0, v1, v2, gradient, lse, offsets, dx0, dx1, dx2,
    cells, numbers, sources, starts, users, weights, bias, query_factors, key_factors,
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
    acc_0, acc_1 = zero_parts(BN, D0, D1)
    user_starts = starts + tl.program_id(2)
    for user in range(tl.load(user_starts), tl.load(user_starts + 1)):
        s = tl.load(users + user)
        stretch = cells + s * _COLUMNS
        q, q_t, q_c = row_pointer(stretch, q0, q1, q2, sub, head, ALIGN)
        k, k_t, k_c = row_pointer(stretch + _K, k0, k1, k2, sub, head, ALIGN)
        v, v_t, v_c = row_pointer(stretch + _V, v0, v1, v2, sub, head, ALIGN)
        g = gradient + tl.load(stretch + _ROW) * o_row + sub * o_sub + head * o_head
        keys = tl.load(stretch + _KEYS).to(tl.int32)
        number, shift = tl.load(numbers + 2 * s), tl.load(numbers + 2 * s + 1)
        k_0, k_1 = load_parts(k, k_t, k_c, n, keys, D, D0, D1, ALIGN)
        if not VALUES:
            v_0, v_1 = load_parts(v, v_t, v_c, n, keys, D, D0, D1, ALIGN)
        for first in range(0, tokens, BM):
            m = first + tl.arange(0, BM)
            scores = products(k_0, k_1, q, q_t, q_c, m, tokens, D, D0, D1, ALIGN, UPCAST)
            scores = add_biases(
                scores * (scale * LOG2E), stretch + _BIAS, shift, bias, query_factors, key_factors,
                sub, head, m, n, tokens, keys, True, BIASED, RANK, UPCAST,
            )  # fmt: skip
            pivot, at = _pivot(lse, stretch, m, tokens)
            p = tl.exp2(scores - pivot[None, :])
            w = number
            if WEIGHTED:
                w = number * load_weights(weights, tl.load(stretch + _WEIGHT), m, tokens)[None, :]
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
    store_parts(out, D, n, length, acc_0, acc_1, D, D0, D1)
