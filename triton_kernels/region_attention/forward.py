"""The forward kernel of region attention and its launch.

A tile of queries walks over a list of the tiles of keys that it may see (`tile_lists`): a branch
instead would keep the loop from being pipelined. Tiles that one region covers come first and need
no test.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, jit, tl
from hookctl.kernels.common.launch import (
    WIDTHS,
    Launch,
    Specimen,
    empty_output,
    interpreting,
    side_by_side,
    sizes,
    strides,
)
from hookctl.kernels.common.launch_tables import REGIONS, forms, needed, tile_for
from hookctl.kernels.common.tiles import (
    LOG2E,
    add_products,
    empty_softmax,
    load_parts,
    load_regions,
    online_softmax,
    products,
    program,
    store_parts,
    zero_parts,
)
from hookctl.kernels.region_attention import backward
from hookctl.kernels.region_attention.tile_lists import apart


@jit
def _forward(
    q_ptr, k_ptr, v_ptr, q_regions_ptr, k_regions_ptr, order_ptr, counts_ptr, out_ptr, lse_ptr,
    tokens, keys, heads, listed, scale,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, out_stride_b, out_stride_h, out_stride_n,
    q_regions_stride, k_regions_stride, lists_b,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. lists_b: lists (tiles of queries) from one row of the batch
    to the next, 0 where it shares them; listed: length of a list."""
    b, h, pair, m = program(heads, BM)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    q_regions_ptr += b * q_regions_stride
    k_regions_ptr += b * k_regions_stride
    at = b * lists_b + tl.program_id(0)
    q_0, q_1 = load_parts(q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN)
    of_queries = load_regions(q_regions_ptr, m, tokens)
    top, norm = empty_softmax(BM)
    acc_0, acc_1 = zero_parts(BM, D0, D1)
    first = 0
    for test in tl.static_range(2):  # first the tiles that one region covers
        last = tl.load(counts_ptr + 2 * at + test)
        for i in range(first, last):
            n = tl.load(order_ptr + at * listed + i) * BN + tl.arange(0, BN)
            scores = products(
                q_0, q_1, k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST
            )
            scores *= scale * LOG2E
            if test:
                of_keys = load_regions(k_regions_ptr, n, keys)
                allowed = (of_queries[:, None] & of_keys[None, :]) != 0
                scores = tl.where(allowed, scores, float("-inf"))
            p, fade, top, norm = online_softmax(scores, top, norm)
            acc_0, acc_1 = add_products(
                acc_0 * fade[:, None], acc_1 * fade[:, None], p,
                v_ptr, v_stride_n, v_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST,
            )  # fmt: skip
        first = last
    gain = (1.0 / tl.where(norm > 0, norm, 1.0))[:, None]
    out_ptr += b * out_stride_b + h * out_stride_h
    store_parts(out_ptr, out_stride_n, m, tokens, acc_0 * gain, acc_1 * gain, D, D0, D1)
    tl.store(lse_ptr + pair * tokens + m, (top + tl.log2(norm)) / LOG2E, mask=m < tokens)


def tile_of(q: Tensor) -> Launch:
    """The tile that queries like these are attended in."""
    return needed(tile_for(REGIONS, (q.shape[-1],), q), REGIONS, q)


@torch.library.custom_op("hookctl::region_attention", mutates_args=())
def operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_regions: Tensor,
    key_regions: Tensor,
    order: Tensor,
    counts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp. Regions: int64 [batch, tokens], whose first stride may be 0;
    order, counts: lists of tiles."""
    batch, heads, tokens, width = q.shape
    tile = tile_of(q)
    constants: dict[str, Any] = {"tokens": tokens, "keys": k.shape[2], "heads": heads}
    constants |= {"scale": scale, "listed": order.shape[2], "lists_b": apart(order)}
    constants |= {"q_regions_stride": query_regions.stride(0)}
    constants |= {"k_regions_stride": key_regions.stride(0)}
    out, lse = _outputs(q, v)
    for name, x, axes in (
        ("q", q, "bhnd"),
        ("k", k, "bhnd"),
        ("v", v, "bhnd"),
        ("out", out, "bhn"),
    ):
        constants |= strides(name, x, axes)
    constants |= sizes(width) | tile.sides | tile.options
    constants |= {"ALIGN": side_by_side(q, k, v), "UPCAST": interpreting()}
    with torch.cuda.device_of(q):
        _forward[order.shape[1], batch * heads](
            q_ptr=q, k_ptr=k, v_ptr=v, q_regions_ptr=query_regions, k_regions_ptr=key_regions,
            order_ptr=order, counts_ptr=counts, out_ptr=out, lse_ptr=lse, **constants,
        )  # fmt: skip
    return out, lse


@operator.register_fake
def _(q, k, v, query_regions, key_regions, order, counts, scale):
    return _outputs(q, v)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_output(q.shape, v), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, ctx.scale = inputs
    ctx.save_for_backward(*given[:5], *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = backward.operator(*ctx.saved_tensors, grad, grad_lse, ctx.scale)
    return *grads, None, None, None, None, None


operator.register_autograd(_backward, setup_context=_setup)


def specimens(arch: str) -> Iterator[Specimen]:
    wanted = [("fp16", width) for width in WIDTHS] + [("bf16", 64), ("fp32", 128), ("fp32", 160)]
    for element, width, tile in forms(REGIONS, arch, wanted):
        types = backward.types(width, tile)
        arguments = form(_forward, element, **types)
        name = f"region_attention forward {element} d{width}"
        yield Specimen(name, _forward, arguments, tile, arch, dots=element != "fp32")
