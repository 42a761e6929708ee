"""RF-Solver-Edit and FireFlow as their official codes write them, for FLUX.1.

Wang et al., arXiv 2411.04746; Deng et al., arXiv 2412.07517. Nothing here is shared with the
recipes: features are taken and put where the modules' own layers give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.recipes.literal_flow import Flux

LAYERS = {"q": "norm_q", "k": "norm_k", "v": "to_v"}  # before rotary embedding


class Info:
    """What the official code hands down to its blocks."""

    def __init__(self, strategy: Sequence[str], ratios: Sequence[float]) -> None:
        self.strategy, self.ratios = list(strategy), dict(zip("qkv", ratios, strict=True))
        self.feature: dict[tuple[Any, ...], Tensor] = {}
        self.t, self.second_order, self.inverse, self.inject = 0.0, False, True, False

    def at_layer(self, block: int, name: str, out: Tensor) -> Tensor:
        key = (self.t, self.second_order, block, name)
        if not self.inject:
            return out
        if self.inverse:
            self.feature[key] = self.ratios[name] * out
        elif key in self.feature:
            if f"replace_{name}" in self.strategy:
                out = self.feature[key]
            elif f"add_{name}" in self.strategy:
                out = out + self.feature[key]
        return out


@contextmanager
def hooked(pipe: Any, info: Info, blocks: Sequence[int]) -> Iterator[None]:
    hooks = []
    for block in blocks:
        attention = pipe.transformer.single_transformer_blocks[block].attn
        for name, layer in LAYERS.items():

            def hook(_: Any, __: Any, out: Tensor, block: int = block, name: str = name) -> Tensor:
                return info.at_layer(block, name, out)

            hooks.append(getattr(attention, layer).register_forward_hook(hook))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def told(x: Tensor, t: float) -> Tensor:
    """The time as schedulers have theirs."""
    return (torch.tensor(t, dtype=torch.float32) * 1000).to(x.dtype) / 1000


@torch.no_grad()
def denoise(
    model: Flux,
    x: Tensor,
    prompt: str,
    scale: float,
    info: Info,
    inject: int,
    *,
    inverse: bool,
    reuse: bool,
) -> Tensor:
    """reuse: of the velocity, FireFlow."""
    injecting = [True] * inject + [False] * (len(model.timesteps) - inject)
    times = list(model.sigmas)
    if inverse:
        times, injecting = times[::-1], injecting[::-1]
    carried: Tensor | None = None
    for i, (now, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        info.t, info.inverse, info.inject = after if inverse else now, inverse, injecting[i]
        half = (after - now) / 2
        info.second_order = False
        pred = model.velocity(x, told(x, now), prompt, scale) if carried is None else carried
        info.second_order = True
        mid = model.velocity(x + half * pred, told(x, now + half), prompt, scale)
        if reuse:
            carried, x = mid, x + (after - now) * mid
        else:
            first_order = (mid - pred) / half
            x = x + (after - now) * pred + 0.5 * (after - now) ** 2 * first_order
    return x


def edited(
    model: Flux,
    x: Tensor,
    prompts: Sequence[str],
    blocks: Sequence[int],
    *,
    inject: int,
    scales: tuple[float, float],
    reuse: bool,
    strategy: Sequence[str] = ("replace_v",),
    ratios: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """The noise and the edit; prompts and scales: upwards and downwards."""
    info = Info(strategy, ratios)
    with hooked(model.pipe, info, blocks):
        noise = denoise(model, x, prompts[0], scales[0], info, inject, inverse=True, reuse=reuse)
        z = denoise(model, noise, prompts[1], scales[1], info, inject, inverse=False, reuse=reuse)
    return noise, z
