"""UniEdit-Flow as its two official codes write it, for FLUX.1 and for SD3 in diffusers.

Jiao et al., arXiv 2504.13109. Nothing here is shared with the recipe. Models are functions of
latents, level and prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, int, str], Tensor]


@torch.no_grad()
def uni_inv(
    velocity: Velocity, x: Tensor, sigmas: list[float], steps: int, zero_init: bool = False
) -> Tensor:
    """sigmas: noisiest first."""
    upwards = sigmas[::-1]
    last = len(upwards) - 1
    v = torch.zeros_like(x) if zero_init else velocity(x, last, "")
    for i in range(steps):
        here, there = upwards[i], upwards[i + 1]
        predicted = x + (there - here) * v
        v = velocity(predicted, last - (i + 1), "")
        x = x + (there - here) * v
    return x


@torch.no_grad()
def uni_edit(
    velocity: Velocity,
    x: Tensor,
    sigmas: list[float],
    steps: int,
    prompts: tuple[str, str],
    omega: float,
    *,
    signed: bool,
) -> Tensor:
    """signed: as the code for diffusers, of latents [1, channels, ...]; else for packed ones."""
    for i in range(len(sigmas) - 1 - steps, len(sigmas) - 1):
        v_src, v_tar = velocity(x, i, prompts[0]), velocity(x, i, prompts[1])
        diff = v_tar - v_src
        if signed:
            mask = diff.mean(1, keepdim=True)
            mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-7)
        else:
            mask = diff.abs().mean(2, keepdim=True)
            mask = (mask - mask.min()) / (mask.max() - mask.min())
        fused = mask * v_tar + (1 - mask) * v_src
        v = fused + omega * (1 + mask) * diff
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x
