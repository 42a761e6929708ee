"""Catch every attention call of a module, and nothing else.

A forward pre-hook of the attention module enters a torch-function mode and an always-called
forward hook leaves it, so the mode sees the torch calls of this module alone: neither text
encoders nor the VAE, in this thread only, and again when gradient checkpointing recomputes. q, k
and v arrive after projection, norm, LoRA and rotary embedding, whatever processor made them.

Under `torch.compile` the call becomes one opaque operator, so that schedules and editors stay
ordinary Python: no graph break, and no new graph when an edit starts or stops.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookctl.address.sites import Site
from hookctl.attention.eager import EagerFollower
from hookctl.errors import HoleError

SDPA = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward


class Handler(Protocol):
    """What a port asks of its owner."""

    def watching(self, site: Site) -> bool:
        """Whether anything wants this site's calls now; notes that the site ran."""

    def attend(
        self, site: Site, index: int, q: Tensor, k: Tensor, v: Tensor, rest: dict[str, Any]
    ) -> Tensor:
        """The output of one attention call, [batch, heads, N, channels]."""

    def batch(self) -> int:
        """Rows of the denoiser call in progress."""


class _SiteMode(TorchFunctionMode):
    """Sees the torch calls of one forward of one attention module."""

    def __init__(self, port: SitePort) -> None:
        super().__init__()
        self.port = port
        self.calls = 0
        self.seen = ""
        self.follower: EagerFollower | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            if torch.compiler.is_compiling():
                return _compiled_attention(self.port.number, *args, **kwargs)
            index, self.calls = self.calls, self.calls + 1
            return self.port.caught(index, *args, **kwargs)
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is _MULTI_HEAD:
            self.seen = "torch.nn.MultiheadAttention, which computes attention by itself"
        if self.port.spelled_out:
            if self.follower is None:
                self.follower = EagerFollower(
                    self.port.site.heads, self.port.handler.batch(), self._followed
                )
            return self.follower.follow(func, args, kwargs)
        if func in (torch.softmax, Tensor.softmax, F.softmax):
            self.seen = "a softmax of its own (an eager processor)"
        return func(*args, **kwargs)

    def _followed(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        index, self.calls = self.calls, self.calls + 1
        return self.port.caught(index, q, k, v, attn_mask=mask, scale=scale)


class SitePort:
    """The hooks on one attention module, with one owner."""

    def __init__(
        self, site: Site, module: nn.Module, handler: Handler, *, spelled_out: bool = False
    ) -> None:
        self.site, self.handler, self.spelled_out = site, handler, spelled_out
        self.number = _register(self)
        self._local = threading.local()
        self._handles = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            _SiteMode(self).__enter__()
            return
        stack = self._stack()
        mode = _SiteMode(self) if self.handler.watching(self.site) else None
        stack.append(mode)
        if mode is not None:
            mode.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            torch.overrides._get_current_function_mode_stack()[-1].__exit__(None, None, None)
            return
        stack = self._stack()
        mode = stack.pop() if stack else None
        if mode is None:
            return
        mode.__exit__(None, None, None)
        # An output of None means that the forward raised: its own error is the one to show.
        if output is not None and mode.calls == 0:
            raise HoleError(
                f"{self.site.path} ran, but its attention could not be caught: it used "
                f"{mode.seen or 'neither scaled_dot_product_attention nor a softmax that was seen'}"
                ". Put the model on its default SDPA processors (unet.set_attn_processor("
                "AttnProcessor2_0()) or reset_attention_backend()), or leave this site out with "
                "the editor's sites="
            )

    def _stack(self) -> list[_SiteMode | None]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack  # type: ignore[no-any-return]

    def caught(
        self,
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
        rest = {
            "attn_mask": attn_mask,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        return self.handler.attend(self.site, index, query, key, value, rest)


# -- torch.compile -----------------------------------------------------------------------------

_ports: weakref.WeakValueDictionary[int, SitePort] = weakref.WeakValueDictionary()
_numbers = iter(range(1, 2**62))
_lock = threading.Lock()


def _register(port: SitePort) -> int:
    with _lock:
        number = next(_numbers)
        _ports[number] = port
    return number


def _compiled_attention(
    number: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return torch.ops.hookctl.attention(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, number
    )


@torch.library.custom_op("hookctl::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    port: int,
) -> Tensor:
    owner = _ports.get(port)
    if owner is None or not owner.handler.watching(owner.site):
        out = SDPA(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    else:
        out = owner.caught(0, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return out.contiguous()


@_attention_op.register_fake
def _(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, port):  # type: ignore[no-untyped-def]
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Recompute the edited call with gradients: the edit itself is differentiable."""
    query, key, value, mask = ctx.saved_tensors
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        out = _attention_op._init_fn(*leaves, mask, *ctx.rest)
    grads = torch.autograd.grad(out, leaves, grad)
    return (*grads, None, None, None, None, None, None)


_attention_op.register_autograd(_backward, setup_context=_save)

__all__ = ["Handler", "SitePort"]
