"""Attention calls inside compiled code: one opaque operator per call.

`torch.compile` traces past Python that runs during tracing only, so schedules and editors must
stand behind an operator that it cannot look into. They then stay ordinary Python: no graph break,
and no new graph when an edit starts or stops.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Ports by the name that compiled graphs know them by: a number would be made a free variable.
ports: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(port: Any, path: str) -> str:
    """A name of its own for a port."""
    name = f"{path}#{next(_numbers)}"
    ports[name] = port
    return name


def attention(
    port: str,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as call `index` of the site behind a port."""
    out: Tensor = torch.ops.hookctl.attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, port, index
    )
    return out


def _evaluate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    port: str,
    index: int,
) -> Tensor:
    owner = ports.get(port)
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if owner is None or not owner.handler.watching(owner.site):
        return F.scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)
    out: Tensor = owner.caught(index, *arguments, scale, enable_gqa)
    return out


@torch.library.custom_op("hookctl::attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    port: str,
    index: int,
) -> Tensor:
    out = _evaluate(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, port, index
    )
    return out.contiguous()


@_forward_op.register_fake
def _(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, port, index):
    if port in ports:
        ports[port].traced = True
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.custom_op("hookctl::attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    port: str,
    index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the edited call again, with gradients: the edit itself is differentiable."""
    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    with torch.enable_grad():
        out = _evaluate(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, port, index)
    found = torch.autograd.grad(out, (q, k, v), grad, allow_unused=True)
    dq, dk, dv = (
        torch.zeros_like(x) if g is None else g.contiguous()
        for x, g in zip((q, k, v), found, strict=True)
    )
    return dq, dk, dv


@_backward_op.register_fake
def _(grad, query, key, value, *rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = torch.ops.hookctl.attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*found, *(None,) * 7)


_forward_op.register_autograd(_backward, setup_context=_save)
