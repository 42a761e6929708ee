"""One softmax, several value tensors: for the rows r of a group

    out_r = softmax(q k^T * scale) v_r

Prompt-to-prompt's self-replacement (Hertz et al., arXiv 2208.01626) gives the source's
probabilities to the source and to all its edits: a batch of R rows costs 1 + R products instead of
2 R. A program holds the accumulators of several rows side by side, as one wide head, so that each
tile of probabilities is multiplied once. Gradients are those of a sum of terms, one of each row.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.arguments import Extras, tables_of
from hookctl.kernels.common.guard import form
from hookctl.kernels.common.launch import (
    DTYPES,
    WIDEST,
    WIDTHS,
    Specimen,
    available,
    check_launch,
    empty_output,
    interpreting,
    pieces,
    side_by_side,
    sizes,
    strides,
)
from hookctl.kernels.common.launch_tables import entry, needed, tile_for
from hookctl.kernels.common.stretches import Stretch
from hookctl.kernels.common.tiles import LOG2E, dot, parts, products, program, seen, unseen
from hookctl.kernels.operators import custom_op, prepared_op
from hookctl.kernels.ready import Ready
from hookctl.kernels.sum_of_terms_backward import gradients

MOST = 4  # rows of values of one program
CHANNELS = 256  # and of all of them together


class Group(NamedTuple):
    """Output rows of equal probabilities: the row of q, the row of k, and each one's row of v."""

    q: int
    k: int
    values: tuple[int, ...]


def reference(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor]:
    """`shared_probabilities` by explicit matrices, in the dtype of its arguments."""
    out, lse = [], []
    for group in groups:
        scores = q[group.q] @ k[group.k].mT * scale
        p = scores.softmax(-1)
        out += [p @ v[row] for row in group.values]
        lse.append(scores.logsumexp(-1))
    return torch.stack(out), torch.stack(lse)


@triton.jit
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


@triton.jit
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


@triton.jit
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
    q_0, q_1 = parts(q_ptr, q_stride_n, q_stride_d, m, tokens, D, D0, D1, ALIGN)
    acc_0 = tl.zeros([BM, COUNT * D0], tl.float32)
    if D1:
        acc_1 = tl.zeros([BM, COUNT * D1], tl.float32)
    top, norm = unseen(BM)
    for first in range(0, keys, BN):
        n = first + tl.arange(0, BN)
        scores = products(
            q_0, q_1, k_ptr, k_stride_n, k_stride_d, n, keys, D, D0, D1, ALIGN, UPCAST
        )
        scores = tl.where((n < keys)[None, :], scores * (scale * LOG2E), float("-inf"))
        p, fade, top, norm = seen(scores, top, norm)
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
    for i, group in enumerate(_decode(integers)):
        for first in range(0, len(group.values), count):
            some = group.values[first : first + count]
            beyond = [-1] * (count - len(some))
            places.append([group.q, group.k, -1 if first else i])
            v_rows.append([*some, *beyond])
            out_rows.append([*range(done, done + len(some)), *beyond])
            done += len(some)
    return tuple(torch.tensor(x, device=device) for x in (places, v_rows, out_rows))


def _encode(groups: Sequence[Group]) -> list[int]:
    return [x for g in groups for x in (g.q, g.k, len(g.values), *g.values)]


def _decode(integers: Sequence[int]) -> list[Group]:
    found, rest = [], list(integers)
    while rest:
        q, k, count, *rest = rest
        found.append(Group(q, k, tuple(rest[:count])))
        rest = rest[count:]
    return found


def _empty(q: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    out = empty_output((sum(len(group.values) for group in groups), *q.shape[1:]), q)
    return out, q.new_empty(len(groups), *q.shape[1:-1], dtype=torch.float32)


@prepared_op(
    "shared_probabilities",
    "(Tensor q, Tensor k, Tensor v, int[] integers, float scale) -> (Tensor, Tensor)",
)
def _operator(q: Any, k: Any, v: Any, integers: Any, scale: float) -> Callable[..., Any]:
    groups = _decode(integers)
    _, sub, heads, n, d = q.shape
    count = _at_once(groups, d)
    places, v_rows, out_rows = _tables(tuple(integers), count, q.device)
    tile = needed(tile_for(TABLE, (count * sum(pieces(d)),), q), TABLE, q)
    constants: dict[str, Any] = {
        "places_ptr": places,
        "v_rows_ptr": v_rows,
        "out_rows_ptr": out_rows,
    }
    constants |= {"tokens": n, "keys": k.shape[-2], "heads": heads, "scale": scale, "COUNT": count}
    for name, x in (("q", q), ("k", k), ("v", v)):
        constants |= strides(name, x, "rbhnd")
    constants |= sizes(d) | tile.sides | tile.options | {"ALIGN": side_by_side(q, k, v)}
    constants["UPCAST"] = interpreting() and q.dtype == torch.bfloat16
    grid = triton.cdiv(n, tile.block_m), sub * heads, len(places)
    launch = Ready(
        _forward, grid, constants, lambda given: strides("out", given["out_ptr"], "rbhn")
    )

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        out, lse = _empty(q, groups)
        with torch.cuda.device_of(q):
            launch(q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse)
        return out, lse

    return run


@_operator.register_fake
def _(q: Any, k: Any, v: Any, integers: Any, scale: float) -> tuple[Tensor, Tensor]:
    return _empty(q, _decode(integers))


@custom_op(
    "shared_probabilities_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor gradient, "
    "Tensor lse_gradient, int[] integers, float scale, bool[] wanted) -> Tensor[]",
)
def _backward_op(
    q: Any, k: Any, v: Any, out: Any, lse: Any, gradient: Any, lse_gradient: Any,
    integers: Any, scale: float, wanted: Any,
) -> list[Tensor]:  # fmt: skip
    groups = _decode(integers)
    pairs = [(i, row) for i, group in enumerate(groups) for row in group.values]
    terms = [Stretch(at, groups[i].q, groups[i].k, row) for at, (i, row) in enumerate(pairs)]
    lse = lse[[i for i, _ in pairs]]
    # A group has one log-sum-exp: its first row answers for it.
    of_terms = torch.zeros_like(lse)
    of_terms[[0, *accumulate(len(group.values) for group in groups[:-1])]] = lse_gradient
    integers, numbers = stretches.encode(terms)
    t = tables_of([q], [k], [v], Extras(), integers, numbers, len(pairs))
    return gradients([q], [k], [v], Extras(), t, scale, out, lse, gradient, of_terms, wanted)


@_backward_op.register_fake
def _(q, k, v, out, lse, gradient, lse_gradient, integers, scale, wanted):
    return [x.new_empty(x.shape if w else (0,)) for x, w in zip((q, k, v), wanted, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *stacks, ctx.integers, ctx.scale = inputs
    ctx.wanted = [x.requires_grad for x in stacks]
    ctx.save_for_backward(*stacks, *output)


def _backward(ctx: Any, gradient: Tensor, lse_gradient: Tensor) -> tuple[Any, ...]:
    found = _backward_op(
        *ctx.saved_tensors, gradient, lse_gradient, ctx.integers, ctx.scale, ctx.wanted
    )
    return *(g if w else None for g, w in zip(found, ctx.wanted, strict=True)), None, None


_operator.register_autograd(_backward, setup_context=_setup)


def shared_probabilities(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor]:
    """Rows that share their probabilities, group by group, in one launch.

    q, k, v: stacks [rows, sub-batch, heads, tokens, channels] of any strides, alike but for their
    rows and tokens. Returns the outputs [rows of all groups in order, sub-batch, heads, N,
    channels] in the dtype of q and the natural log-sum-exp of the scores, float32 [groups,
    sub-batch, heads, N]; both are differentiable in q, k and v.
    """
    why = available(q.device)
    if why:
        raise ValueError(f"shared_probabilities: {why}")
    check_launch("shared_probabilities", q)
    alike = {(x.dtype, x.device, x.dim(), x.shape[1:3], x.shape[-1]) for x in (q, k, v)}
    if len(alike) > 1 or q.dim() != 5 or k.shape[-2] != v.shape[-2] or not k.shape[-2]:
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, k, v))
        raise ValueError(
            f"shared_probabilities: q, k, v are {shapes}; give stacks [rows, sub-batch, heads, "
            "tokens, channels] of one dtype and device, k and v of as many tokens"
        )
    if q.dtype not in DTYPES or q.shape[-1] > WIDEST:
        raise ValueError(
            f"shared_probabilities: q is {q.dtype} with {q.shape[-1]} channels; give fp32, fp16 "
            f"or bf16 with at most {WIDEST}"
        )
    if not groups or not all(group.values for group in groups):
        raise ValueError("shared_probabilities: give groups, each of one row of values or more")
    for group in groups:
        named = ((group.q, q), (group.k, k), *((row, v) for row in group.values))
        if not all(0 <= row < len(x) for row, x in named):
            rows = ", ".join(str(len(x)) for x in (q, k, v))
            raise ValueError(f"shared_probabilities: {group}, but q, k, v have {rows} rows")
    return _operator(q, k, v, _encode(groups), scale)


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
