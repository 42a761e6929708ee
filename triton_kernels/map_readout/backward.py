"""The gradient of `map_readout`, by recomputation:

    dS = P * (dP - r),    r_n = sum_t P_nt dP_nt,    dP = dmap / heads at the chosen keys, else 0

dP of a tile of keys is dmap times a one-hot matrix, so a map may be of any keys in any order. dk is
summed over splits of the queries in partial results, not by atomics: runs are bit-identical.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, jit, tl
from hookctl.kernels.common.launch import (
    Specimen,
    cdiv,
    empty_output,
    interpreting,
    side_by_side,
    sizes,
)
from hookctl.kernels.common.launch_tables import GRADIENTS, MAPS, forms, needed, tile_for
from hookctl.kernels.common.tiles import (
    LOG2E,
    add_products,
    dot,
    load_parts,
    load_pivots,
    products,
    program,
    store_parts,
    zero_parts,
)

PROGRAMS = 256  # queries are split until there are about so many


def padded(count: int) -> int:
    """Columns of a tile of so many chosen tokens."""
    return max(16, 1 << (count - 1).bit_length())


@jit
def _spread(grad, one_hot, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """grad [m, t] times a one-hot matrix [t, n], by tensor cores where SPLIT.

    Two bf16 pieces hold 16 bits of grad, and the product with 0 and 1 is exact: more than the half
    precision of the operands that it meets.
    """
    acc = tl.zeros([grad.shape[0], one_hot.shape[1]], tl.float32)
    if SPLIT:
        coarse = grad.to(tl.bfloat16)
        fine = (grad - coarse.to(tl.float32)).to(tl.bfloat16)
        which = one_hot.to(tl.float32).to(tl.bfloat16)
        acc = dot(coarse, which, acc, UPCAST)
        return dot(fine, which, acc, UPCAST)
    else:
        return dot(grad, one_hot.to(tl.float32), acc, UPCAST)


@jit
def _chosen_and_grad(
    chosen_ptr, grad_ptr, b, m, tokens, keys, heads, count, chosen_stride, grad_stride_b,
    BT: tl.constexpr,
):  # fmt: skip
    """The chosen keys [t], and dP at them [m, t]."""
    t = tl.arange(0, BT)
    chosen = tl.load(chosen_ptr + b * chosen_stride + t, mask=t < count, other=keys).to(tl.int32)
    mask = (m < tokens)[:, None] & (chosen < keys)[None, :]
    at = b * grad_stride_b + m[:, None] * count + t[None, :]
    return chosen, tl.load(grad_ptr + at, mask=mask, other=0.0) / heads


@jit
def _of_queries(
    q_ptr, k_ptr, chosen_ptr, lse_ptr, grad_ptr, dq_ptr, r_ptr, tokens, keys, heads, count, scale,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_n, chosen_stride, grad_stride_b,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq and r of one tile of queries of one head."""
    b, h, pair, m = program(heads, BM)
    k_ptr += b * k_stride_b + h * k_stride_h
    q_ptr += b * q_stride_b + h * q_stride_h
    q_0, q_1 = load_parts(q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN)
    lse = load_pivots(lse_ptr + pair * tokens, m, tokens)
    chosen, grad = _chosen_and_grad(
        chosen_ptr, grad_ptr, b, m, tokens, keys, heads, count, chosen_stride, grad_stride_b, BT
    )
    at_chosen = products(
        q_0, q_1, k_ptr, k_stride_n, k_stride_d, chosen, keys, D, D0, D1, ALIGN, UPCAST
    )
    r = tl.sum(tl.exp2(at_chosen * (scale * LOG2E) - lse[:, None]) * grad, 1)
    tl.store(r_ptr + pair * tokens + m, r, mask=m < tokens)
    dq_0, dq_1 = zero_parts(BM, D0, D1)
    for first in range(0, keys, BN):
        n = first + tl.arange(0, BN)
        scores = products(
            q_0, q_1, k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST
        )
        p = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
        dp = _spread(grad, chosen[:, None] == n[None, :], SPLIT, UPCAST)
        # Keys past the end are loaded as 0, and add nothing.
        dq_0, dq_1 = add_products(
            dq_0, dq_1, p * (dp - r[:, None]), k_ptr, k_stride_n, k_stride_d, n, keys,
            D, D0, D1, ALIGN, UPCAST,
        )  # fmt: skip
    dq_ptr += b * dq_stride_b + h * dq_stride_h
    store_parts(dq_ptr, dq_stride_n, m, tokens, dq_0 * scale, dq_1 * scale, D, D0, D1)


@jit
def _of_keys(
    q_ptr, k_ptr, chosen_ptr, lse_ptr, grad_ptr, r_ptr, dk_ptr, tokens, keys, heads, count, scale,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    chosen_stride, grad_stride_b,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk of one tile of keys of one head, over every num_programs(2)-th tile of queries."""
    b, h, pair, n = program(heads, BM)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    lse_ptr += pair * tokens
    r_ptr += pair * tokens
    k_0, k_1 = load_parts(k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN)
    dk_0, dk_1 = zero_parts(BM, D0, D1)
    for first in range(tl.program_id(2) * BN, tokens, tl.num_programs(2) * BN):
        m = first + tl.arange(0, BN)
        scores = products(
            k_0, k_1, q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN, UPCAST
        )
        lse = load_pivots(lse_ptr, m, tokens)
        p = tl.exp2(scores * (scale * LOG2E) - lse[None, :])
        chosen, grad = _chosen_and_grad(
            chosen_ptr, grad_ptr, b, m, tokens, keys, heads, count, chosen_stride,
            grad_stride_b, BT,
        )  # fmt: skip
        dp = tl.trans(_spread(grad, chosen[:, None] == n[None, :], SPLIT, UPCAST))
        r = tl.load(r_ptr + m, mask=m < tokens, other=0.0)
        dk_0, dk_1 = add_products(
            dk_0, dk_1, p * (dp - r[None, :]), q_ptr, q_stride_n, q_stride_d, m, tokens,
            D, D0, D1, ALIGN, UPCAST,
        )  # fmt: skip
    dk_ptr += (tl.program_id(2) * tl.num_programs(1) + pair) * keys * D
    store_parts(dk_ptr, D, n, keys, dk_0 * scale, dk_1 * scale, D, D0, D1)


TABLE = MAPS + GRADIENTS


@torch.library.custom_op("hookctl::map_gradients", mutates_args=())
def operator(
    q: Tensor, k: Tensor, tokens: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """dq and dk. tokens: int64 [batch, T], those without a key beyond the last."""
    batch, heads, length, width = q.shape
    keys, count = k.shape[2], tokens.shape[1]
    tile = needed(tile_for(TABLE, (width,), q), TABLE, q)
    constants: dict[str, Any] = sizes(width) | tile.sides | tile.options
    constants |= {"BT": padded(count), "SPLIT": q.element_size() == 2}
    constants |= {"ALIGN": side_by_side(q, k), "UPCAST": interpreting()}
    grad, r, dq = grad.contiguous(), torch.empty_like(lse), empty_output(q.shape, q)
    tiles, key_tiles = (cdiv(x, tile.block_m) for x in (length, keys))
    with torch.cuda.device_of(q):
        _of_queries[tiles, batch * heads](
            q, k, tokens, lse, grad, dq, r, length, keys, heads, count, scale,
            *q.stride(), *k.stride(), *dq.stride()[:3], tokens.stride(0), grad.stride(0),
            **constants,
        )  # fmt: skip
    splits = max(1, min(cdiv(length, tile.block_n), PROGRAMS // (key_tiles * batch * heads)))
    dk = q.new_empty(splits, batch, heads, keys, width, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _of_keys[key_tiles, batch * heads, splits](
            q, k, tokens, lse, grad, r, dk, length, keys, heads, count, scale,
            *q.stride(), *k.stride(), tokens.stride(0), grad.stride(0), **constants,
        )  # fmt: skip
    return dq, dk.sum(0).to(k.dtype)


@operator.register_fake
def _(q, k, tokens, lse, grad, scale):
    return empty_output(q.shape, q), k.new_empty(k.shape)


def specimens(arch: str) -> Iterator[Specimen]:
    for element, width, tile in forms(TABLE, arch):
        types = {
            **sizes(width), **tile.sides, "BT": 16, "SPLIT": element != "fp32", "ALIGN": 2,
            "chosen_ptr": "*i64:16", "lse_ptr": "*fp32:16", "grad_ptr": "*fp32:16",
            "r_ptr": "*fp32:16", "chosen_stride": "i32", "grad_stride_b": "i32",
        }  # fmt: skip
        dots = element != "fp32"  # fp32 is multiplied without tensor cores
        for name, kernel in (("dq", _of_queries), ("dk", _of_keys)):
            more = {} if kernel is _of_queries else {"dk_ptr": "*fp32:16"}
            arguments = form(kernel, element, **types, **more)
            full = f"map_readout {name} {element} d{width}"
            yield Specimen(full, kernel, arguments, tile, arch, dots)
