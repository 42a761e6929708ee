"""Gradients of `region_attention`, recomputed tile by tile:

    P = exp(S - lse),   dS = P * (dP - delta),   delta_n = <grad_n, out_n> - grad of lse_n

dq walks over the tiles of keys as the forward does, dk and dv over the tiles of queries that see a
tile of keys. Nothing is summed by atomics.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, jit, tl
from hookctl.kernels.common.launch import (
    Launch,
    Specimen,
    empty_output,
    interpreting,
    side_by_side,
    sizes,
)
from hookctl.kernels.common.launch_tables import GRADIENTS, REGIONS, forms, needed, tile_for
from hookctl.kernels.common.tiles import (
    LOG2E,
    add_products,
    load_parts,
    load_pivots,
    load_regions,
    products,
    program,
    row_dot,
    store_parts,
    zero_parts,
)
from hookctl.kernels.region_attention.tile_lists import apart, tile_lists


@jit
def _of_queries(
    q_ptr, k_ptr, v_ptr, q_regions_ptr, k_regions_ptr, order_ptr, counts_ptr, out_ptr, lse_ptr,
    grad_ptr, grad_lse_ptr, dq_ptr, delta_ptr, tokens, keys, heads, listed, scale,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, out_stride_b, out_stride_h, out_stride_n,
    grad_stride_b, grad_stride_h, grad_stride_n, dq_stride_b, dq_stride_h, dq_stride_n,
    q_regions_stride, k_regions_stride, lists_b,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq and delta of one tile of queries of one head."""
    b, h, pair, m = program(heads, BM)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    out_ptr += b * out_stride_b + h * out_stride_h
    grad_ptr += b * grad_stride_b + h * grad_stride_h
    k_regions_ptr += b * k_regions_stride
    at = b * lists_b + tl.program_id(0)
    row = pair * tokens + m
    q_0, q_1 = load_parts(q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN)
    o_0, o_1 = load_parts(out_ptr, out_stride_n, 1, m, tokens, D, D0, D1, 2)
    g_0, g_1 = load_parts(grad_ptr, grad_stride_n, 1, m, tokens, D, D0, D1, 2)
    delta = row_dot(g_0, g_1, o_0, o_1, D1)
    delta -= tl.load(grad_lse_ptr + row, mask=m < tokens, other=0.0)
    tl.store(delta_ptr + row, delta, mask=m < tokens)
    lse = load_pivots(lse_ptr + pair * tokens, m, tokens)
    of_queries = load_regions(q_regions_ptr + b * q_regions_stride, m, tokens)
    dq_0, dq_1 = zero_parts(BM, D0, D1)
    first = 0
    for test in tl.static_range(2):  # first the tiles that one region covers
        last = tl.load(counts_ptr + 2 * at + test)
        for i in range(first, last):
            n = tl.load(order_ptr + at * listed + i) * BN + tl.arange(0, BN)
            scores = products(
                q_0, q_1, k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST
            )
            p = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
            if test:
                of_keys = load_regions(k_regions_ptr, n, keys)
                p = tl.where((of_queries[:, None] & of_keys[None, :]) != 0, p, 0.0)
            dp = products(
                g_0, g_1, v_ptr, v_stride_n, v_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST
            )
            dq_0, dq_1 = add_products(
                dq_0, dq_1, p * (dp - delta[:, None]),
                k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST,
            )  # fmt: skip
        first = last
    dq_ptr += b * dq_stride_b + h * dq_stride_h
    store_parts(dq_ptr, dq_stride_n, m, tokens, dq_0 * scale, dq_1 * scale, D, D0, D1)


@jit
def _of_keys(
    q_ptr, k_ptr, v_ptr, q_regions_ptr, k_regions_ptr, order_ptr, counts_ptr, lse_ptr, delta_ptr,
    grad_ptr, dk_ptr, dv_ptr, tokens, keys, heads, listed, scale,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, grad_stride_b, grad_stride_h, grad_stride_n,
    dk_stride_b, dk_stride_h, dk_stride_n, dv_stride_b, dv_stride_h, dv_stride_n,
    q_regions_stride, k_regions_stride, lists_b,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one head; tiles are [keys, queries]."""
    b, h, pair, n = program(heads, BM)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    grad_ptr += b * grad_stride_b + h * grad_stride_h
    q_regions_ptr += b * q_regions_stride
    lse_ptr += pair * tokens
    delta_ptr += pair * tokens
    at = b * lists_b + tl.program_id(0)
    k_0, k_1 = load_parts(k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN)
    v_0, v_1 = load_parts(v_ptr, v_stride_n, v_stride_d, n, keys, D, D0, D1, ALIGN)
    of_keys = load_regions(k_regions_ptr + b * k_regions_stride, n, keys)
    dk_0, dk_1 = zero_parts(BM, D0, D1)
    dv_0, dv_1 = zero_parts(BM, D0, D1)
    first = 0
    for test in tl.static_range(2):  # first the tiles that one region covers
        last = tl.load(counts_ptr + 2 * at + test)
        for i in range(first, last):
            m = tl.load(order_ptr + at * listed + i) * BN + tl.arange(0, BN)
            lse = load_pivots(lse_ptr, m, tokens)
            delta = tl.load(delta_ptr + m, mask=m < tokens, other=0.0)
            scores = products(
                k_0, k_1, q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN, UPCAST
            )
            p = tl.exp2(scores * (scale * LOG2E) - lse[None, :])
            if test:
                of_queries = load_regions(q_regions_ptr, m, tokens)
                p = tl.where((of_keys[:, None] & of_queries[None, :]) != 0, p, 0.0)
            dv_0, dv_1 = add_products(
                dv_0, dv_1, p, grad_ptr, grad_stride_n, 1, m, tokens, D, D0, D1, 2, UPCAST
            )
            dp = products(v_0, v_1, grad_ptr, grad_stride_n, 1, m, tokens, D, D0, D1, 2, UPCAST)
            dk_0, dk_1 = add_products(
                dk_0, dk_1, p * (dp - delta[None, :]),
                q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN, UPCAST,
            )  # fmt: skip
        first = last
    dk_ptr += b * dk_stride_b + h * dk_stride_h
    store_parts(dk_ptr, dk_stride_n, n, keys, dk_0 * scale, dk_1 * scale, D, D0, D1)
    dv_ptr += b * dv_stride_b + h * dv_stride_h
    store_parts(dv_ptr, dv_stride_n, n, keys, dv_0, dv_1, D, D0, D1)


TABLE = REGIONS + GRADIENTS


@torch.library.custom_op("hookctl::region_gradients", mutates_args=())
def operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_regions: Tensor,
    key_regions: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. Regions: int64 [batch, tokens], whose first stride may be 0."""
    dq, dk, dv = _outputs(q, k, v)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta, grad_lse = torch.empty_like(lse), grad_lse.contiguous()
    batch, heads, tokens, width = q.shape
    keys = k.shape[2]
    tile = needed(tile_for(TABLE, (width,), q), TABLE, q)
    same = query_regions.stride(0) == key_regions.stride(0) == 0
    of_queries, of_keys = (r[:1] if same else r for r in (query_regions, key_regions))
    constants = sizes(width) | tile.sides | tile.options
    constants |= {"ALIGN": side_by_side(q, k, v), "UPCAST": interpreting()}
    order, counts = tile_lists(of_queries, of_keys, tile.block_m, tile.block_n)
    with torch.cuda.device_of(q):
        _of_queries[order.shape[1], batch * heads](
            q, k, v, query_regions, key_regions, order, counts, out, lse, grad, grad_lse, dq, delta,
            tokens, keys, heads, order.shape[2], scale,
            *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *grad.stride()[:3],
            *dq.stride()[:3], query_regions.stride(0), key_regions.stride(0),
            apart(order), **constants,
        )  # fmt: skip
    order, counts = tile_lists(of_keys, of_queries, tile.block_m, tile.block_n)
    with torch.cuda.device_of(q):
        _of_keys[order.shape[1], batch * heads](
            q, k, v, query_regions, key_regions, order, counts, lse, delta, grad, dk, dv,
            tokens, keys, heads, order.shape[2], scale,
            *q.stride(), *k.stride(), *v.stride(), *grad.stride()[:3], *dk.stride()[:3],
            *dv.stride()[:3], query_regions.stride(0), key_regions.stride(0),
            apart(order), **constants,
        )  # fmt: skip
    return dq, dk, dv


@operator.register_fake
def _(q, k, v, query_regions, key_regions, out, lse, grad, grad_lse, scale):
    return _outputs(q, k, v)


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_output(q.shape, q), empty_output(k.shape, k), empty_output(v.shape, v)


def types(width: int, tile: Launch) -> dict[str, Any]:
    """What all kernels over regions are compiled for, but for what is `form`'s rule."""
    return {
        **sizes(width), **tile.sides, "ALIGN": 2, "lse_ptr": "*fp32:16",
        **dict.fromkeys(("q_regions_ptr", "k_regions_ptr"), "*i64:16"),
        **dict.fromkeys(("order_ptr", "counts_ptr"), "*i32:16"),
    }  # fmt: skip


def specimens(arch: str) -> Iterator[Specimen]:
    for element, width, tile in forms(TABLE, arch):
        common = types(width, tile) | {"delta_ptr": "*fp32:16"}
        for name, kernel in (("dq", _of_queries), ("dk dv", _of_keys)):
            more = {"grad_lse_ptr": "*fp32:16"} if kernel is _of_queries else {}
            arguments = form(kernel, element, **common, **more)
            full = f"region_attention {name} {element} d{width}"
            yield Specimen(full, kernel, arguments, tile, arch, dots=element != "fp32")
