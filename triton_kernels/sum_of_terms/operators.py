"""The sum of terms as an operator of torch: traced, faked and differentiated as one."""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common import stretches
from hookctl.kernels.common.arguments import Extras, tables_of
from hookctl.kernels.common.launch import empty_output
from hookctl.kernels.sum_of_terms.backward import gradients
from hookctl.kernels.sum_of_terms.forward import forward

_ARGUMENTS = (
    "Tensor[] q, Tensor[] k, Tensor[] v, Tensor? weights, Tensor? bias, Tensor? query_factors, "
    "Tensor? key_factors, int[] integers, float[] numbers, int rows, float scale"
)


def _empty(q: Sequence[Tensor], rows: int, terms: int, lse: bool) -> tuple[Tensor, Tensor]:
    shape = (terms, *q[0].shape[1:-1]) if lse else (0,)
    return empty_output((rows, *q[0].shape[1:]), q[0]), q[0].new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "hookctl::sum_of_terms",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool lse) -> (Tensor, Tensor)",
)
def forward_operator(
    q: Any, k: Any, v: Any, weights: Any, bias: Any, query_factors: Any, key_factors: Any,
    integers: Any, numbers: Any, rows: int, scale: float, lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """integers, numbers: the terms, encoded. The log-sum-exp is empty where it is not asked for."""
    extras = Extras(weights, bias, query_factors, key_factors)
    t = tables_of(q, k, v, extras, integers, numbers, rows)
    out, found = _empty(q, rows, len(t.terms), lse)
    forward(q, k, v, extras, t, scale, out, found if lse else None)
    return out, found


@forward_operator.register_fake
def _(
    q: Any, k: Any, v: Any, weights: Any, bias: Any, query_factors: Any, key_factors: Any,
    integers: Any, numbers: Any, rows: int, scale: float, lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(q, rows, sum(s.closes for s in stretches.decode(integers, numbers)), lse)


@torch.library.custom_op(
    "hookctl::sum_of_terms_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor gradient, Tensor lse_gradient, "
    "bool[] wanted) -> Tensor[]",
)
def backward_operator(
    q: Any, k: Any, v: Any, weights: Any, bias: Any, query_factors: Any, key_factors: Any,
    integers: Any, numbers: Any, rows: int, scale: float, out: Tensor, lse: Tensor,
    gradient: Tensor, lse_gradient: Tensor, wanted: Any,
) -> list[Tensor]:  # fmt: skip
    extras = Extras(weights, bias, query_factors, key_factors)
    t = tables_of(q, k, v, extras, integers, numbers, rows)
    return gradients(q, k, v, extras, t, scale, out, lse, gradient, lse_gradient, wanted)


@backward_operator.register_fake
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
    found = backward_operator(
        q, k, v, *extras, *ctx.rest, out, lse, gradient, lse_gradient, ctx.wanted
    )
    grads = iter(g if w else None for g, w in zip(found, ctx.wanted, strict=True))
    of_stacks = [[next(grads) for _ in range(count)] for count in ctx.counts]
    return (*of_stacks, next(grads, None), None, None, None, None, None, None, None, None)


forward_operator.register_autograd(_backward, setup_context=_setup)
