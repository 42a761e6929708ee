"""Appearance sharing as the papers' code writes it: on matrices and on halves of a batch.

MasaCtrl (arXiv 2304.08465) and StyleAligned (arXiv 2312.02133) on a UNet with classifier-free
guidance, rows [u_source, u_edits ..., c_source, c_edits ...]. Nothing here is shared with the
recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Attend = Callable[["Call"], Tensor]


class Call:
    """One attention call: q, k, v [rows, heads, tokens, channels], and where and when it is."""

    def __init__(self, path: str, cross: bool, step: int, scale: float, *qkv: Tensor) -> None:
        self.path, self.cross, self.step, self.scale = path, cross, step, scale
        self.q, self.k, self.v = qkv

    def probabilities(self, q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        return (q @ k.mT * self.scale + bias).softmax(-1)

    def plain(self) -> Tensor:
        return self.probabilities(self.q, self.k) @ self.v

    def halves(self, new: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """`new(q, k, v)` of the unconditional half, then of the conditional one."""
        return torch.cat([new(*x) for x in zip(*(y.chunk(2) for y in self.qkv), strict=True)])

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


class _Processor:
    def __init__(self, path: str, owner: Literal) -> None:
        self.path, self.owner = path, owner

    def __call__(
        self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        qkv = [y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in projected]
        cross = encoder_hidden_states is not None
        call = Call(self.path, cross, self.owner.step, attn.scale, *qkv)
        out = self.owner.attend(call).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


class Literal:
    """Puts `attend` in the place of every attention of a UNet, and counts the steps."""

    def __init__(self, attend: Attend) -> None:
        self.attend, self.step = attend, -1

    @contextmanager
    def instead(self, unet: torch.nn.Module) -> Iterator[None]:
        before = unet.attn_processors
        unet.set_attn_processor({path: _Processor(path, self) for path in before})

        def enter(*_: Any) -> None:
            self.step += 1

        handle = unet.register_forward_pre_hook(enter)
        try:
            yield
        finally:
            handle.remove()
            unet.set_attn_processor(before)
