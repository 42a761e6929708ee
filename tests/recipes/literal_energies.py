"""Attend-and-Excite, BoxDiff and layout guidance as the official code writes them: loops in full,
over one image, on matrices that the attention processors leave behind. Nothing here is shared with
the recipes.

Chefer et al., arXiv 2301.13826; Xie et al., arXiv 2307.10816; Chen et al., arXiv 2304.03373.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GUIDANCE = 4.0


class Model:
    """A pipeline's UNet with its cross-attention written out and kept: `maps`, by path, each
    [heads, cells, tokens]."""

    def __init__(self, pipe: Any, unet: Any = None) -> None:
        self.pipe, self.unet = pipe, pipe.unet if unet is None else unet
        self.maps: dict[str, Tensor] = {}

    @contextmanager
    def written_out(self) -> Iterator[Model]:
        before = self.unet.attn_processors
        self.unet.set_attn_processor({path: _Processor(path, self.maps) for path in before})
        frozen = [p for p in self.unet.parameters() if p.requires_grad]
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield self
        finally:
            self.unet.set_attn_processor(before)
            for p in frozen:
                p.requires_grad_(True)

    def text(self, prompt: str, negative: str = "blurry") -> Tensor:
        cond, uncond = self.pipe.encode_prompt([prompt], "cpu", 1, True, [negative])
        return torch.cat([uncond, cond])

    def start(self, seed: int, steps: int) -> Tensor:
        self.pipe.scheduler.set_timesteps(steps)
        side = self.unet.config.sample_size
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((1, 4, side, side), generator=generator, dtype=torch.float64)
        return x * self.pipe.scheduler.init_noise_sigma

    def conditional(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = self.pipe.scheduler.scale_model_input(x, t)
        return self.unet(x, t, encoder_hidden_states=text[1:]).sample

    @torch.no_grad()
    def guided(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        both = self.pipe.scheduler.scale_model_input(torch.cat([x] * 2), t)
        u, c = self.unet(both, t, encoder_hidden_states=text).sample.chunk(2)
        return u + GUIDANCE * (c - u)

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.pipe.scheduler.step(self.guided(x, t, text), t, x).prev_sample


class _Processor:
    def __init__(self, path: str, maps: dict[str, Tensor]) -> None:
        self.path, self.maps = path, maps

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        p = (q @ k.mT * attn.scale).softmax(-1)
        if encoder_hidden_states is not None:
            self.maps[self.path] = p[-1]
        out = (p @ v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


# -- Attend-and-Excite and BoxDiff -----------------------------------------------------------------


def for_text(model: Model, side: int) -> Tensor:
    """softmax(100 A) over all tokens but the first and the last, [side, side, tokens]."""
    kept = [m for m in model.maps.values() if m.shape[1] == side * side]
    maps = torch.cat([m.reshape(-1, side, side, m.shape[-1]) for m in kept])
    return ((maps.sum(0) / len(maps))[:, :, 1:-1] * 100).softmax(-1)


def smoothed(image: Tensor, sigma: float = 0.5) -> Tensor:
    at = torch.arange(3, dtype=torch.float64) - 1
    kernel = torch.exp(-((at / (2 * sigma)) ** 2))
    kernel = torch.outer(kernel, kernel)
    kernel = (kernel / kernel.sum())[None, None]
    return F.conv2d(F.pad(image[None, None], (1, 1, 1, 1), mode="reflect"), kernel)[0, 0]


def excite(model: Model, side: int, indices: list[int]) -> tuple[Tensor, ...]:
    """The loss, three times: that of a refinement, of its bound, and of the update."""
    found = for_text(model, side)
    losses = [(1 - smoothed(found[:, :, i - 1]).max()).clamp_min(0) for i in indices]
    loss = max(losses)
    return loss, loss, loss


class BoxLoss:
    """BoxDiff's; after a refinement the other terms are those of before it, without a gradient."""

    def __init__(self, boxes: list[tuple[float, ...]], share: float = 0.2, reach: int = 1) -> None:
        self.boxes, self.share, self.reach = boxes, share, reach

    def __call__(self, model: Model, side: int, indices: list[int]) -> tuple[Tensor, ...]:
        inner, rest = [], []
        found = for_text(model, side)
        for i, fractions in zip(indices, self.boxes, strict=True):
            x1, y1, x2, y2 = (max(round(512 * f / (512 / side)), 0) for f in fractions)
            mask = torch.zeros(side, side, dtype=torch.float64)
            mask[y1:y2, x1:x2] = 1
            image = smoothed(found[:, :, i - 1])
            for weight, terms in ((mask, inner), (1 - mask, rest)):
                count = int((weight.float().sum() * self.share).long())
                top = (image * weight).reshape(-1).topk(count)[0].mean()
                terms.append((1 - top if terms is inner else top).clamp_min(0))
            for dim, ends in ((0, (x1, x2)), (1, (y1, y2))):
                near = torch.zeros(side, dtype=torch.float64)
                for end in ends:
                    near[max(end - self.reach, 0) : min(end + self.reach + 1, side)] = 1
                away = (image.max(dim=dim)[0] - mask.max(dim=dim)[0]).abs()
                rest.append((away * near).mean())
        return max(inner), max(inner), sum(inner) + sum(rest)

    def stale(self, model: Model, side: int, indices: list[int]) -> Tensor:
        """What of the loss has a gradient after a refinement."""
        found = for_text(model, side)
        total = torch.zeros((), dtype=torch.float64)
        for i, fractions in zip(indices, self.boxes, strict=True):
            x1, y1, x2, y2 = (max(round(512 * f / (512 / side)), 0) for f in fractions)
            mask = torch.zeros(side, side, dtype=torch.float64)
            mask[y1:y2, x1:x2] = 1
            count = int((mask.float().sum() * self.share).long())
            top = (smoothed(found[:, :, i - 1]) * mask).reshape(-1).topk(count)[0].mean()
            total = total + (1 - top).clamp_min(0)
        return total


def excited(
    model: Model,
    prompt: str,
    indices: list[int],
    losses: Callable[..., tuple[Tensor, ...]],
    *,
    thresholds: dict[int, float],
    seed: int = 0,
    steps: int = 6,
    max_iter: int = 3,
    scale: float = 20.0,
    side: int = 16,
    most: int = 20,
) -> tuple[Tensor, list[int]]:
    """The final latents, and how many rounds each refinement took."""
    x, text, rounds = model.start(seed, steps), model.text(prompt), []
    scale_range = np.linspace(1.0, 0.5, steps)

    def at(x: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = x.clone().detach().requires_grad_(True)
        model.conditional(leaf, t, text)
        return leaf, losses(model, side, indices)

    def update(leaf: Tensor, loss: Tensor, rho: float) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, [leaf], retain_graph=True)
        return (leaf - rho * gradient).detach()

    for i, t in enumerate(model.pipe.scheduler.timesteps):
        rho = scale * np.sqrt(scale_range[i])
        leaf, (_, tested, full) = at(x, t)
        x = leaf
        if i in thresholds and tested > 1 - thresholds[i]:
            count = 0
            while tested > max(0.0, 1 - thresholds[i]):
                count += 1
                leaf, (loss, tested, _) = at(x, t)
                if loss != 0:
                    x = update(leaf, loss, rho)
                if count >= most:
                    break
            rounds.append(count)
            leaf, (_, _, full) = at(x, t)
            x = leaf
            if isinstance(losses, BoxLoss):
                full = losses.stale(model, side, indices)
        if i < max_iter and full != 0:
            x = update(leaf, full, rho)
        x = model.step(x.detach(), t, text)
    return x, rounds


# -- layout guidance -------------------------------------------------------------------------------


def laid_out(
    model: Model,
    prompt: str,
    indices: list[list[int]],
    boxes: list[list[tuple[float, ...]]],
    *,
    paths: list[str],
    seed: int = 0,
    steps: int = 6,
    max_step: int = 2,
    max_iter: int = 5,
    threshold: float = 0.2,
    scale: float = 30.0,
) -> tuple[Tensor, int]:
    """The final latents, and how many steps were taken against the loss."""
    x, text, taken = model.start(seed, steps), model.text(prompt), 0
    scheduler, loss = model.pipe.scheduler, torch.tensor(10000.0)
    for index, t in enumerate(scheduler.timesteps):
        iteration = 0
        while loss.item() / scale > threshold and iteration < max_iter and index < max_step:
            leaf = x.clone().detach().requires_grad_(True)
            model.conditional(leaf, t, text)
            total = torch.zeros((), dtype=torch.float64)
            for path in paths:
                heads, cells, _ = model.maps[path].shape
                side = int(math.sqrt(cells))
                for object_, own in zip(indices, boxes, strict=True):
                    mask = torch.zeros(side, side, dtype=torch.float64)
                    for box in own:
                        x1, y1, x2, y2 = (int(f * side) for f in box)
                        mask[y1:y2, x1:x2] = 1
                    of_object = torch.zeros((), dtype=torch.float64)
                    for position in object_:
                        map_ = model.maps[path][:, :, position].reshape(heads, side, side)
                        inside = (map_ * mask).reshape(heads, -1).sum(-1)
                        share = inside / map_.reshape(heads, -1).sum(-1)
                        of_object = of_object + ((1 - share) ** 2).mean()
                    total = total + of_object / len(object_)
            loss = total / (len(boxes) * len(paths)) * scale
            (gradient,) = torch.autograd.grad(loss, [leaf])
            x = (leaf - gradient * float(scheduler.sigmas[index]) ** 2).detach()
            iteration += 1
            taken += 1
        x = model.step(x, t, text)
    return x, taken
