"""The kernels of the read-outs and their launches."""

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
    interpreting,
    side_by_side,
    sizes,
    strides,
)
from hookctl.kernels.common.launch_tables import MAPS, forms, needed, tile_for
from hookctl.kernels.common.tiles import (
    LOG2E,
    empty_softmax,
    load_parts,
    load_pivots,
    online_softmax,
    products,
    program,
)
from hookctl.kernels.map_readout import backward

MOST_TOKENS = 128  # of one launch
PROGRAMS = 256  # work is split over heads until there are about so many


@jit
def _log_sum_exp(
    q_0, q_1, k_ptr, k_token, k_channel, keys, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of the scores of some queries over all keys, in base 2."""
    top, norm = empty_softmax(BM)
    for first in range(0, keys, BN):
        n = first + tl.arange(0, BN)
        scores = products(q_0, q_1, k_ptr, k_token, k_channel, n, keys, D, D0, D1, ALIGN, UPCAST)
        scores = tl.where((n < keys)[None, :], scores * scale, float("-inf"))
        _, _, top, norm = online_softmax(scores, top, norm)
    return top + tl.log2(norm)


@jit
def _forward(
    q_ptr, k_ptr, chosen_ptr, given_ptr, map_ptr, lse_ptr, tokens, keys, heads, count, scale,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    chosen_stride,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, GIVEN: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maps [splits, batch, N, count] of a tile of queries, summed over the heads of one split.

    chosen: positions of keys, those without a key beyond the last. GIVEN: whether the
    log-sum-exps are; else they are found and written to lse.
    """
    b = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    t = tl.arange(0, BT)
    chosen = tl.load(chosen_ptr + b * chosen_stride + t, mask=t < count, other=keys).to(tl.int32)
    total = tl.zeros([BM, BT], tl.float32)
    for i in range(tl.program_id(2), heads, tl.num_programs(2)):
        h = tl.cast(i, tl.int64)
        q_at = q_ptr + b * q_stride_b + h * q_stride_h
        k_at = k_ptr + b * k_stride_b + h * k_stride_h
        q_0, q_1 = load_parts(q_at, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN)
        at = (b * heads + h) * tokens
        if GIVEN:
            lse = load_pivots(given_ptr + at, m, tokens)
        else:
            lse = _log_sum_exp(
                q_0, q_1, k_at, k_stride_n, k_stride_d, keys, scale * LOG2E,
                BM, BN, D, D0, D1, ALIGN, UPCAST,
            )  # fmt: skip
            tl.store(lse_ptr + at + m, lse / LOG2E, mask=m < tokens)
        scores = products(
            q_0, q_1, k_at, k_stride_n, k_stride_d, chosen, keys, D, D0, D1, ALIGN, UPCAST
        )
        total += tl.exp2(scores * (scale * LOG2E) - lse[:, None])
    total = tl.where((chosen < keys)[None, :], total / heads, 0.0)
    rows = (tl.program_id(2) * tl.num_programs(1) + b) * tokens + m
    mask = (m < tokens)[:, None] & (t < count)[None, :]
    tl.store(map_ptr + rows[:, None] * count + t[None, :], total, mask=mask)


@jit
def _marginals(
    q_ptr, k_ptr, lse_ptr, out_ptr, tokens, keys, heads, scale,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Probabilities of a tile of keys summed over all queries, [batch, heads, M]."""
    b, h, pair, n = program(heads, BN)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    k_0, k_1 = load_parts(k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN)
    total = tl.zeros([BN], tl.float32)
    for first in range(0, tokens, BM):
        m = first + tl.arange(0, BM)
        scores = products(
            k_0, k_1, q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN, UPCAST
        )
        lse = load_pivots(lse_ptr + pair * tokens, m, tokens)
        total += tl.sum(tl.exp2(scores * (scale * LOG2E) - lse[None, :]), 1)
    tl.store(out_ptr + pair * keys + n, total, mask=n < keys)


def _constants(q: Tensor, k: Tensor, scale: float) -> dict[str, Any]:
    tile = needed(tile_for(MAPS, (q.shape[-1],), q), MAPS, q)
    found = {"tokens": q.shape[2], "keys": k.shape[2], "heads": q.shape[1], "scale": scale}
    found |= strides("q", q, "bhnd") | strides("k", k, "bhnd")
    of_loads = {"ALIGN": side_by_side(q, k), "UPCAST": interpreting()}
    return found | sizes(q.shape[-1]) | tile.sides | tile.options | of_loads


@torch.library.custom_op("hookctl::map_readout", mutates_args=())
def operator(
    q: Tensor, k: Tensor, tokens: Tensor, lse: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Maps of at most MOST_TOKENS keys, and the log-sum-exp. tokens: int64 [batch, T], those
    without a key beyond the last."""
    batch, heads, length, _ = q.shape
    constants, count = _constants(q, k, scale), tokens.shape[1]
    tiles = cdiv(length, constants["BM"])
    splits = max(1, min(heads, PROGRAMS // (tiles * batch)))
    constants |= {"count": count, "chosen_stride": tokens.stride(0)}
    constants |= {"BT": backward.padded(count), "GIVEN": lse is not None}
    maps = q.new_empty(splits, batch, length, count, dtype=torch.float32)
    found = q.new_empty(batch, heads, length, dtype=torch.float32)
    given = found if lse is None else lse.contiguous()
    with torch.cuda.device_of(q):
        _forward[tiles, batch, splits](
            q_ptr=q, k_ptr=k, chosen_ptr=tokens, given_ptr=given, map_ptr=maps, lse_ptr=found,
            **constants,
        )  # fmt: skip
    return maps.sum(0), found if lse is None else lse.clone()


@operator.register_fake
def _(q, k, tokens, lse, scale):
    batch, heads, length, _ = q.shape
    maps = q.new_empty(batch, length, tokens.shape[1], dtype=torch.float32)
    return maps, q.new_empty(batch, heads, length, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, tokens, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, tokens, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    dq, dk = backward.operator(*ctx.saved_tensors, grad, ctx.scale)
    return dq, dk, None, None, None


operator.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("hookctl::key_marginals", mutates_args=())
def marginals_operator(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Marginals of each head, [batch, heads, M]. lse: contiguous."""
    batch, heads, _, _ = q.shape
    keys, constants = k.shape[2], _constants(q, k, scale)
    out = q.new_empty(batch, heads, keys, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _marginals[cdiv(keys, constants["BN"]), batch * heads](
            q_ptr=q, k_ptr=k, lse_ptr=lse, out_ptr=out, **constants
        )
    return out


@marginals_operator.register_fake
def _(q, k, lse, scale):
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=torch.float32)


def specimens(arch: str) -> Iterator[Specimen]:
    for element, width, tile in forms(MAPS, arch):
        types = {**sizes(width), **tile.sides, "ALIGN": 2, "lse_ptr": "*fp32:16"}
        more = {
            "chosen_ptr": "*i64:16", "given_ptr": "*fp32:16", "map_ptr": "*fp32:16",
            "chosen_stride": "i32", "BT": 16, "GIVEN": False,
        }  # fmt: skip
        dots = element != "fp32"  # fp32 is multiplied without tensor cores
        arguments = form(_forward, element, **types, **more)
        yield Specimen(f"map_readout {element} d{width}", _forward, arguments, tile, arch, dots)
        if width == 160:
            arguments = form(_marginals, element, **types, out_ptr="*fp32:16")
            name = f"key_marginals {element} d{width}"
            yield Specimen(name, _marginals, arguments, tile, arch, dots)
