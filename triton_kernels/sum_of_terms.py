"""Flash attention over any number of terms per output row:

    out = sum_j  w_j(query) * softmax(Q_j K_j^T * scale + bias_j) V_j

Each term names the rows of the stacks that its q, k and v come from, so that rows which borrow
from each other are one launch and nothing is gathered. A softmax may run over several stretches
of keys. The kernels are in `sum_of_terms_forward` and `sum_of_terms_backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.arguments import Extras, tables_of
from hookctl.kernels.common.launch import DTYPES, WIDEST, available, check_launch, empty_output
from hookctl.kernels.common.stretches import STACKS, Stretch
from hookctl.kernels.operators import custom_op, prepared_op
from hookctl.kernels.sum_of_terms_backward import gradients
from hookctl.kernels.sum_of_terms_forward import forward

__all__ = ["Stretch", "reference", "sum_of_terms"]


def reference(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    terms: Sequence[Stretch],
    scale: float,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum by explicit matrices, in the dtype of its arguments; see `sum_of_terms`."""
    out: dict[int, Tensor] = {}
    found = []
    for term in stretches.terms(terms):
        scores = torch.cat([_scores(q, k, s, scale, bias, factors) for s in term], -1)
        values = torch.cat([stretches.row_of(v, s.v) for s in term], -2)
        empty = (scores == float("-inf")).all(-1)
        scores = scores.masked_fill(empty[..., None], 0.0)
        p = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
        found.append(scores.logsumexp(-1).masked_fill(empty, float("-inf")))
        last = term[-1]
        part = p @ values * last.weight
        if last.weights >= 0 and weights is not None:
            part = part * weights[last.weights, :, None]
        out[last.row] = out[last.row] + part if last.row in out else part
    return torch.stack([out[row] for row in sorted(out)]), torch.stack(found)


def _scores(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    s: Stretch,
    scale: float,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
) -> Tensor:
    scores = stretches.row_of(q, s.q) @ stretches.row_of(k, s.k).mT * scale + s.shift
    keys = scores.shape[-1]
    if bias is not None and s.bias >= 0:
        scores = scores + bias[s.bias, ..., None, :keys]
    if factors is not None and s.factors >= 0:
        scores = scores + (factors[0][s.factors] @ factors[1][s.factors].mT)[:, :keys]
    return scores


_ARGUMENTS = (
    "Tensor[] q, Tensor[] k, Tensor[] v, Tensor? weights, Tensor? bias, Tensor? query_factors, "
    "Tensor? key_factors, int[] integers, float[] numbers, int rows, float scale"
)


def _empty(q: Sequence[Tensor], rows: int, terms: int, lse: bool) -> tuple[Tensor, Tensor]:
    shape = (terms, *q[0].shape[1:-1]) if lse else (0,)
    return empty_output((rows, *q[0].shape[1:]), q[0]), q[0].new_empty(shape, dtype=torch.float32)


@prepared_op("sum_of_terms", f"({_ARGUMENTS}, bool lse) -> (Tensor, Tensor)")
def _forward_op(
    q: Any, k: Any, v: Any, weights: Any, bias: Any, query_factors: Any, key_factors: Any,
    integers: Any, numbers: Any, rows: int, scale: float, lse: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    extras = Extras(weights, bias, query_factors, key_factors)
    t = tables_of(q, k, v, extras, integers, numbers, rows)
    fill = forward(q, k, v, extras, t, scale, rows, lse)

    def run(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        out, found = _empty(q, rows, len(t.terms), lse)
        fill(q, k, v, Extras(*rest[:4]), out, found if lse else None)
        return out, found

    return run


@_forward_op.register_fake
def _(
    q: Any, k: Any, v: Any, weights: Any, bias: Any, query_factors: Any, key_factors: Any,
    integers: Any, numbers: Any, rows: int, scale: float, lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(q, rows, sum(s.closes for s in stretches.decode(integers, numbers)), lse)


@custom_op(
    "sum_of_terms_backward",
    f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor gradient, Tensor lse_gradient, "
    "bool[] wanted) -> Tensor[]",
)
def _backward_op(
    q: Any, k: Any, v: Any, weights: Any, bias: Any, query_factors: Any, key_factors: Any,
    integers: Any, numbers: Any, rows: int, scale: float, out: Tensor, lse: Tensor,
    gradient: Tensor, lse_gradient: Tensor, wanted: Any,
) -> list[Tensor]:  # fmt: skip
    extras = Extras(weights, bias, query_factors, key_factors)
    t = tables_of(q, k, v, extras, integers, numbers, rows)
    return gradients(q, k, v, extras, t, scale, out, lse, gradient, lse_gradient, wanted)


@_backward_op.register_fake
def _(
    q: Any, k: Any, v: Any, weights: Any, bias: Any, query_factors: Any, key_factors: Any,
    integers: Any, numbers: Any, rows: int, scale: float, out: Tensor, lse: Tensor,
    gradient: Tensor, lse_gradient: Tensor, wanted: Any,
) -> list[Tensor]:  # fmt: skip
    given = [*q, *k, *v, *([] if weights is None else [weights])]
    return [x.new_empty(x.shape if w else (0,)) for x, w in zip(given, wanted, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *extras = inputs[:7]
    ctx.counts = len(q), len(k), len(v)
    ctx.rest = inputs[7:11]
    ctx.given = [x is not None for x in extras]
    ctx.wanted = [x.requires_grad for x in (*q, *k, *v)]
    ctx.wanted += [extras[0].requires_grad] if ctx.given[0] else []
    kept = [x for x in extras if x is not None]
    ctx.save_for_backward(*q, *k, *v, *kept, *output)


def _backward(ctx: Any, gradient: Tensor, lse_gradient: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    q, k, v = ([next(saved) for _ in range(count)] for count in ctx.counts)
    extras = [next(saved) if given else None for given in ctx.given]
    out, lse = saved
    found = _backward_op(q, k, v, *extras, *ctx.rest, out, lse, gradient, lse_gradient, ctx.wanted)
    grads = iter(g if w else None for g, w in zip(found, ctx.wanted, strict=True))
    of_stacks = [[next(grads) for _ in range(count)] for count in ctx.counts]
    return (*of_stacks, next(grads, None), None, None, None, None, None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup)


def sum_of_terms(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    terms: Sequence[Stretch],
    scale: float,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The sum of the terms of each output row.

    Receives
      q, k, v: up to three stacks each [rows, sub-batch, heads, tokens, channels], of any strides,
        one dtype and one head width; the queries of one length, the keys of any.
      terms: sorted by output row, from 0 on without a gap.
      weights: per query, [W, N]; bias: of the keys, [B, sub-batch | 1, heads | 1, M]; factors:
        rank-r biases, [F, N, r] and [F, M, r], added to the scaled scores.
    Returns
      out: [rows, sub-batch, heads, N, channels] in the dtype of q; a query without any allowed key
        gets 0. lse: natural log-sum-exp of the scores [terms, sub-batch, heads, N] in fp32, -inf
        for such a query; None unless asked for.

    Differentiable in q, k, v and weights, and through lse; biases are constants.
    """
    q, k, v, terms = list(q), list(k), list(v), list(terms)
    _check(q, k, v, terms)
    _check_extras(q, k, terms, weights, bias, factors)
    extras = Extras.of(q[0], weights, bias, factors)
    given = [*q, *k, *v, *([] if weights is None else [weights])]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    integers, numbers = stretches.encode(terms)
    rows = terms[-1].row + 1
    out, found = _forward_op(q, k, v, *extras, integers, numbers, rows, scale, lse or learns)
    return out, found if lse else None


def _check(q: list[Tensor], k: list[Tensor], v: list[Tensor], terms: list[Stretch]) -> None:
    first = q[0]
    why = available(first.device)
    if why:
        raise ValueError(f"sum_of_terms: {why}")
    check_launch("sum_of_terms", first)
    for name, stacks in (("q", q), ("k", k), ("v", v)):
        if not 0 < len(stacks) <= STACKS:
            raise ValueError(f"sum_of_terms: {name} is {len(stacks)} stacks; give 1 to {STACKS}")
        for x in stacks:
            alike = x.dtype == first.dtype and x.device == first.device and x.dim() == 5
            if not alike or (x.shape[1:3], x.shape[-1]) != (first.shape[1:3], first.shape[-1]):
                raise ValueError(
                    f"sum_of_terms: {name} has {x.dtype} {tuple(x.shape)} on {x.device}; it must "
                    f"be like q, {first.dtype} {tuple(first.shape)} on {first.device}, but for its "
                    "rows and tokens"
                )
        _check_rows(terms, name, sum(len(x) for x in stacks), least=0)
    if first.dtype not in DTYPES or first.shape[-1] > WIDEST:
        raise ValueError(
            f"sum_of_terms: q is {first.dtype} with {first.shape[-1]} channels; give fp32, fp16 "
            f"or bf16 with at most {WIDEST}"
        )
    lengths = [x.shape[-2] for x in q]
    if len(set(lengths)) > 1:
        raise ValueError(f"sum_of_terms: the stacks of q have {lengths} tokens; give one length")
    for s in terms:
        of_k, of_v = stretches.row_of(k, s.k).shape[-2], stretches.row_of(v, s.v).shape[-2]
        if of_k != of_v:
            raise ValueError(f"sum_of_terms: {s} has {of_k} keys and {of_v} values")
    rows = [s.row for s in terms]
    if rows != sorted(rows) or set(rows) != set(range(rows[-1] + 1)) or not terms[-1].closes:
        raise ValueError("sum_of_terms: sort the terms by row, each row from 0 on with one or more")


def _check_rows(terms: list[Stretch], name: str, rows: int, least: int) -> None:
    for s in terms:
        if not least <= getattr(s, name) < rows:
            raise ValueError(f"sum_of_terms: {s}, but there are {rows} rows of {name}")


def _check_extras(
    q: list[Tensor],
    k: list[Tensor],
    terms: list[Stretch],
    weights: Tensor | None,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
) -> None:
    _, sub, heads, tokens, _ = q[0].shape
    of_queries, of_keys = factors or (None, None)
    for name, x in (("weights", weights), ("bias", bias), ("factors", of_queries)):
        _check_rows(terms, name, 0 if x is None else len(x), least=-1)

    def longest(name: str) -> int:
        used = (s for s in terms if getattr(s, name) >= 0)
        return max((stretches.row_of(k, s.k).shape[-2] for s in used), default=0)

    def check(name: str, x: Tensor, fits: bool, want: str) -> None:
        if not fits or x.device != q[0].device:
            raise ValueError(
                f"sum_of_terms: {name} is {tuple(x.shape)} on {x.device}; give [rows, {want}] "
                f"on {q[0].device}"
            )

    if weights is not None:
        check("weights", weights, tuple(weights.shape[1:]) == (tokens,), f"{tokens}")
    if bias is not None:
        of_sub, of_heads, keys = bias.shape[1:] if bias.dim() == 4 else (0, 0, -1)
        fits = of_sub in (1, sub) and of_heads in (1, heads) and keys >= longest("bias")
        check("bias", bias, fits, f"{sub} or 1, {heads} or 1, {longest('bias')} or more")
    if of_queries is not None and of_keys is not None:
        rows, rank = len(of_queries), of_queries.shape[-1]
        fits = tuple(of_queries.shape) == (rows, tokens, rank)
        check("the first of factors", of_queries, fits, f"{tokens}, r")
        fits = of_keys.dim() == 3 and tuple(of_keys.shape[::2]) == (rows, rank)
        fits = fits and of_keys.shape[1] >= longest("factors")
        check("the second of factors", of_keys, fits, f"{longest('factors')} or more, {rank}")
    constants = [x for x in (bias, of_queries, of_keys) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in constants):
        raise ValueError(
            "sum_of_terms: biases are constants; detach them, or use SDPA to learn them"
        )
