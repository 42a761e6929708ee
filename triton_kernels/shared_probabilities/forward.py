"""The forward kernel of shared probabilities and its launch.

A program holds the accumulators of several rows side by side, as one wide head, so that each tile
of probabilities is multiplied once.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, jit, tl
from hookctl.kernels.common.launch import (
    WIDTHS,
    Specimen,
    cdiv,
    empty_output,
    interpreting,
    pieces,
    side_by_side,
    sizes,
    strides,
)
from hookctl.kernels.common.launch_tables import entry, needed, tile_for
from hookctl.kernels.common.tiles import (
    LOG2E,
    dot,
    empty_softmax,
    load_parts,
    online_softmax,
    products,
    program,
)
from hookctl.kernels.shared_probabilities import backward
from hookctl.kernels.shared_probabilities.groups import Group, decode

MOST = 4  # rows of values of one program
CHANNELS = 256  # and of all of them together


@jit
def _beside(
    pointer, rows, row_stride, tokens, channels, i, length,
    COUNT: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The tokens i of COUNT rows side by side, [tokens i, COUNT * WIDTH], WIDTH channels of each
    from FROM on; 0 outside the length and the D channels, and where a row is -1."""
    c = tl.arange(0, COUNT * WIDTH)
    row = tl.max_constancy(tl.load(rows + c // WIDTH), WIDTH)
    channel = FROM + c % WIDTH
    mask = (i[:, None] < length) & ((row >= 0) & (channel < D))[None, :]
    at = pointer + i[:, None].to(tl.int64) * tokens
    if ALIGN > 1:
        return tl.load(at + (row * row_stride + channel)[None, :], mask=mask, other=0.0)
    return tl.load(at + (row * row_stride + channel * channels)[None, :], mask=mask, other=0.0)


@jit
def _spread(
    pointer, rows, row_stride, tokens, i, length, x,
    COUNT: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write what `_beside` reads, where the channels of a token lie side by side."""
    c = tl.arange(0, COUNT * WIDTH)
    row = tl.max_constancy(tl.load(rows + c // WIDTH), WIDTH)
    channel = FROM + c % WIDTH
    mask = (i[:, None] < length) & ((row >= 0) & (channel < D))[None, :]
    at = pointer + i[:, None].to(tl.int64) * tokens + (row * row_stride + channel)[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=mask)


@jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, places_ptr, v_rows_ptr, out_rows_ptr,
    tokens, keys, heads, scale,
    q_stride_r, q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    k_stride_r, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_r, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    out_stride_r, out_stride_b, out_stride_h, out_stride_n,
    COUNT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, for up to COUNT rows of values of one group.

    places: of each program, int64, the rows of q, of k and of the log-sum-exp, which is -1 but for
    the first program of a group; v_rows, out_rows: int64 [programs, COUNT], -1 beyond the last.
    """
    b, h, pair, m = program(heads, BM)
    places_ptr += 3 * tl.program_id(2)
    v_rows_ptr += COUNT * tl.program_id(2)
    out_rows_ptr += COUNT * tl.program_id(2)
    q_ptr += tl.load(places_ptr) * q_stride_r + b * q_stride_b + h * q_stride_h
    k_ptr += tl.load(places_ptr + 1) * k_stride_r + b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    out_ptr += b * out_stride_b + h * out_stride_h
    q_0, q_1 = load_parts(q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN)
    acc_0 = tl.zeros([BM, COUNT * D0], tl.float32)
    if D1:
        acc_1 = tl.zeros([BM, COUNT * D1], tl.float32)
    top, norm = empty_softmax(BM)
    for first in range(0, keys, BN):
        n = first + tl.arange(0, BN)
        scores = products(
            q_0, q_1, k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST
        )
        scores = tl.where((n < keys)[None, :], scores * (scale * LOG2E), float("-inf"))
        p, fade, top, norm = online_softmax(scores, top, norm)
        v_0 = _beside(
            v_ptr, v_rows_ptr, v_stride_r, v_stride_n, v_stride_d, n, keys, COUNT, 0, D0, D, ALIGN
        )
        p = p.to(v_0.dtype)
        acc_0 = dot(p, v_0, acc_0 * fade[:, None], UPCAST)
        if D1:
            v_1 = _beside(
                v_ptr, v_rows_ptr, v_stride_r, v_stride_n, v_stride_d, n, keys,
                COUNT, D0, D1, D, ALIGN,
            )  # fmt: skip
            acc_1 = dot(p, v_1, acc_1 * fade[:, None], UPCAST)
    gain = (1.0 / norm)[:, None]
    _spread(
        out_ptr, out_rows_ptr, out_stride_r, out_stride_n, m, tokens, acc_0 * gain,
        COUNT, 0, D0, D,
    )  # fmt: skip
    if D1:
        _spread(
            out_ptr, out_rows_ptr, out_stride_r, out_stride_n, m, tokens, acc_1 * gain,
            COUNT, D0, D1, D,
        )  # fmt: skip
    group = tl.load(places_ptr + 2)
    at = group * tl.num_programs(1) + pair
    mask = m < tl.where(group >= 0, tokens, 0)
    tl.store(lse_ptr + at * tokens + m, (top + tl.log2(norm)) / LOG2E, mask=mask)


TABLE = "shared probabilities"  # by the channels that are held side by side


def _at_once(groups: Sequence[Group], width: int) -> int:
    """Rows of values of one program: a power of two whose channels fit in registers."""
    longest = max(len(group.values) for group in groups)
    fits = max(CHANNELS // sum(pieces(width)), 1)
    return min(1 << (longest - 1).bit_length(), 1 << (fits.bit_length() - 1), MOST)


@lru_cache(maxsize=256)
def _tables(integers: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    """places, v_rows and out_rows of the kernel, copied to the device once."""
    places, v_rows, out_rows, done = [], [], [], 0
    for i, group in enumerate(decode(integers)):
        for first in range(0, len(group.values), count):
            some = group.values[first : first + count]
            beyond = [-1] * (count - len(some))
            places.append([group.q, group.k, -1 if first else i])
            v_rows.append([*some, *beyond])
            out_rows.append([*range(done, done + len(some)), *beyond])
            done += len(some)
    return tuple(torch.tensor(x, device=device) for x in (places, v_rows, out_rows))


def _empty(q: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    out = empty_output((sum(len(group.values) for group in groups), *q.shape[1:]), q)
    return out, q.new_empty(len(groups), *q.shape[1:-1], dtype=torch.float32)


@torch.library.custom_op(
    "hookctl::shared_probabilities",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int[] integers, float scale) -> (Tensor, Tensor)",
)
def operator(
    q: Tensor, k: Tensor, v: Tensor, integers: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The outputs and the log-sum-exp. integers: the groups, encoded."""
    groups = decode(integers)
    _, sub, heads, n, d = q.shape
    count = _at_once(groups, d)
    places, v_rows, out_rows = _tables(tuple(integers), count, q.device)
    tile = needed(tile_for(TABLE, (count * sum(pieces(d)),), q), TABLE, q)
    out, lse = _empty(q, groups)
    constants: dict[str, Any] = {"tokens": n, "keys": k.shape[-2], "heads": heads}
    constants |= {"scale": scale, "COUNT": count}
    for name, x in (("q", q), ("k", k), ("v", v)):
        constants |= strides(name, x, "rbhnd")
    constants |= strides("out", out, "rbhn")
    constants |= sizes(d) | tile.sides | tile.options | {"ALIGN": side_by_side(q, k, v)}
    constants |= {"UPCAST": interpreting() and q.dtype == torch.bfloat16}
    with torch.cuda.device_of(q):
        _forward[cdiv(n, tile.block_m), sub * heads, len(places)](
            q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse,
            places_ptr=places, v_rows_ptr=v_rows, out_rows_ptr=out_rows, **constants,
        )  # fmt: skip
    return out, lse


@operator.register_fake
def _(q, k, v, integers, scale):
    return _empty(q, decode(integers))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *stacks, ctx.integers, ctx.scale = inputs
    ctx.wanted = [x.requires_grad for x in stacks]
    ctx.save_for_backward(*stacks, *output)


def _backward(ctx: Any, gradient: Tensor, lse_gradient: Tensor) -> tuple[Any, ...]:
    found = backward.operator(
        *ctx.saved_tensors, gradient, lse_gradient, ctx.integers, ctx.scale, ctx.wanted
    )
    return *(g if w else None for g, w in zip(found, ctx.wanted, strict=True)), None, None


operator.register_autograd(_backward, setup_context=_setup)


def specimens(arch: str) -> Iterator[Specimen]:
    """Each head width with as many rows of values as fit, and fewer of the usual one."""
    fullest = [Group(0, 0, tuple(range(MOST)))]
    wanted = [(64, 1), (64, 2)] + [(d, _at_once(fullest, d)) for d in WIDTHS]
    for element, (d, count) in product(("fp16", "fp32"), wanted):
        tile = entry(TABLE, arch, (count * sum(pieces(d)),), element)
        if tile is None:
            continue
        types = {
            "COUNT": count, **sizes(d), **tile.sides, "ALIGN": 2, "lse_ptr": "*fp32:16",
            **dict.fromkeys(("places_ptr", "v_rows_ptr", "out_rows_ptr"), "*i64:16"),
        }  # fmt: skip
        arguments = form(_forward, element, **types)
        name = f"shared_probabilities {element} {count} of {d}"
        yield Specimen(name, _forward, arguments, tile, arch, dots=element != "fp32")
