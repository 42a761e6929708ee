"""Flash attention between tokens that share a region:

    out_n = sum_m softmax_m(q_n k_m * scale) v_m     over the keys with query_regions & key_regions

Every token has an int64 bit set, and no mask is formed. A tile of queries walks over a list of the
tiles of keys that it may see (`region_lists`): a branch instead would keep the loop from being
pipelined. Tiles that one region covers come first and need no test. A query that shares a region
with no key gives 0, and its log-sum-exp is -inf. The gradients (`region_gradients`) are recomputed
tile by tile (Dao, arXiv 2307.08691), without atomics: runs are bit-identical.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hookctl.kernels import region_gradients
from hookctl.kernels.common.guard import form
from hookctl.kernels.common.launch import (
    WIDTHS,
    Launch,
    Specimen,
    check_grid,
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
    nothing,
    parts,
    products,
    program,
    region_bits,
    seen,
    store,
    unseen,
)
from hookctl.kernels.operators import prepared_op
from hookctl.kernels.ready import Ready
from hookctl.kernels.region_lists import tile_lists


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_regions: Tensor,
    key_regions: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`region_attention` by an explicit matrix, in the dtype of its arguments."""
    allowed = (query_regions[..., :, None] & key_regions[..., None, :]) != 0
    allowed = allowed[:, None] if allowed.dim() == 3 else allowed
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    empty = ~allowed.any(-1, keepdim=True)
    # Rows without a key are let see all of them and cut afterwards: their gradient is 0, not NaN.
    scores = scores.masked_fill(~(allowed | empty), float("-inf"))
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return (scores.softmax(-1) @ v).masked_fill(empty, 0.0), lse


@triton.jit
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
    q_0, q_1 = parts(q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN)
    of_queries = region_bits(q_regions_ptr, m, tokens)
    top, norm = unseen(BM)
    acc_0, acc_1 = nothing(BM, D0, D1)
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
                of_keys = region_bits(k_regions_ptr, n, keys)
                allowed = (of_queries[:, None] & of_keys[None, :]) != 0
                scores = tl.where(allowed, scores, float("-inf"))
            p, fade, top, norm = seen(scores, top, norm)
            acc_0, acc_1 = add_products(
                acc_0 * fade[:, None], acc_1 * fade[:, None], p,
                v_ptr, v_stride_n, v_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST,
            )  # fmt: skip
        first = last
    gain = (1.0 / tl.where(norm > 0, norm, 1.0))[:, None]
    out_ptr += b * out_stride_b + h * out_stride_h
    store(out_ptr, out_stride_n, m, tokens, acc_0 * gain, acc_1 * gain, D, D0, D1)
    tl.store(lse_ptr + pair * tokens + m, (top + tl.log2(norm)) / LOG2E, mask=m < tokens)


def _launch(x: Tensor) -> Launch:
    return needed(tile_for(REGIONS, (x.shape[-1],), x), REGIONS, x)


@prepared_op(
    "region_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor query_regions, Tensor key_regions, Tensor order, "
    "Tensor counts, float scale) -> (Tensor, Tensor)",
)
def _operator(
    q: Any, k: Any, v: Any, of_queries: Any, of_keys: Any, order: Any, counts: Any, scale: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    batch, heads, tokens, width = q.shape
    tile = _launch(q)
    constants = {"tokens": tokens, "keys": k.shape[2], "heads": heads, "listed": order.shape[2]}
    constants |= {"scale": scale, "lists_b": lists_between(order)}
    constants |= {"q_regions_stride": of_queries.stride(0), "k_regions_stride": of_keys.stride(0)}
    for name, x in (("q", q), ("k", k), ("v", v)):
        constants |= strides(name, x, "bhnd")
    constants |= sizes(width) | tile.sides | tile.options
    constants |= {"ALIGN": side_by_side(q, k, v), "UPCAST": interpreting()}
    grid = order.shape[1], batch * heads
    launch = Ready(_forward, grid, constants, lambda given: strides("out", given["out_ptr"], "bhn"))

    def run(
        q: Any, k: Any, v: Any, of_queries: Any, of_keys: Any, order: Any, counts: Any, *_: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = _outputs(q, v)
        with torch.cuda.device_of(q):
            launch(
                q_ptr=q, k_ptr=k, v_ptr=v, q_regions_ptr=of_queries, k_regions_ptr=of_keys,
                order_ptr=order, counts_ptr=counts, out_ptr=out, lse_ptr=lse,
            )  # fmt: skip
        return out, lse

    return run


def lists_between(order: Tensor) -> int:
    """Lists from one row of the batch to the next."""
    return order.shape[1] if order.shape[0] > 1 else 0


@_operator.register_fake
def _(q, k, v, query_regions, key_regions, order, counts, scale):
    return _outputs(q, v)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_output(q.shape, v), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, ctx.scale = inputs
    ctx.save_for_backward(*given[:5], *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = region_gradients.operator(*ctx.saved_tensors, grad, grad_lse, ctx.scale)
    return *grads, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def lists(query_regions: Tensor, key_regions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of tiles for queries `like` these, made once and given to many calls."""
    tile = _launch(like)
    return tile_lists(
        query_regions.reshape(-1, query_regions.shape[-1]),
        key_regions.reshape(-1, key_regions.shape[-1]),
        tile.block_m,
        tile.block_n,
    )


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_regions: Tensor,
    key_regions: Tensor,
    scale: float | None = None,
    listed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the scores, both differentiable in q, k and v.

    q: [batch, heads, N, channels]; k, v: [batch, heads, M, channels], up to 160 channels, any
    strides; query_regions, key_regions: int64 [N] and [M] on the same device, or a row of both for
    each of the batch; scale: channels ** -0.5 by default; listed: `lists` of the same regions.
    Returns [batch, heads, N, channels] and float32 [batch, heads, N].
    """
    check_grid("region_attention", q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    order, counts = listed or lists(query_regions, key_regions, q)
    of_queries, of_keys = (
        r.contiguous().expand(q.shape[0], -1) for r in (query_regions, key_regions)
    )
    return _operator(q, k, v, of_queries, of_keys, order, counts, scale)


def specimens(arch: str) -> Iterator[Specimen]:
    wanted = [("fp16", width) for width in WIDTHS] + [("bf16", 64), ("fp32", 128), ("fp32", 160)]
    for element, width, tile in forms(REGIONS, arch, wanted):
        types = region_gradients.types(width, tile)
        arguments = form(_forward, element, **types)
        name = f"region_attention forward {element} d{width}"
        yield Specimen(name, _forward, arguments, tile, arch, dots=element != "fp32")
