"""Latents that show what sampling passes through and clean images never teach how to leave.

Wherever two places for an object, or two objects in a place, are as likely, a half-noised image
holds some of both. So some samples show a weaker copy of one object beside it, or one object mixed
with another in its place, and what is to be found in them is the true scene.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .world import Scene, ghost, mistake

# The shares of the samples.
GHOSTED = 0.3
MISTAKEN = 0.35


def haunted(
    scenes: Sequence[Scene],
    z: Tensor,
    encode: Callable[[Sequence[Scene]], Tensor],
    rng: np.random.Generator,
    near: float = 0.0,
) -> Tensor:
    """Latents in which some scenes show one object at a strength p and, at q, what is wrong: a
    copy of it elsewhere or another object in its place.

    Receives: the scenes with their latents `z` [batch, channels, h, w], `encode`, which makes such
    latents, and the share of the copies that stand one place beside the object.
    """
    found: dict[int, tuple[Scene, Scene, float, float]] = {}
    for i, scene in enumerate(scenes):
        u = rng.random()
        if u < GHOSTED and (made := ghost(scene, rng, beside=u < near * GHOSTED)) is not None:
            p = rng.uniform(0.4, 1.0)
            # Where the two overlap they share one object's strength.
            q = min(p * rng.uniform(0.0, 0.9), p if made[2] else 1.0 - p)
            found[i] = made[0], made[1], p, q
        elif u > 1.0 - MISTAKEN and (swapped := mistake(scene, rng)) is not None:
            p = rng.uniform(0.1, 1.0)
            found[i] = *swapped, p, (1.0 - p) * rng.uniform(0.3, 1.0)
    if not found:
        return z
    at = list(found)
    without, wrong, *strengths = zip(*found.values(), strict=True)
    rest, other = encode([*without, *wrong]).chunk(2)
    own, false = (torch.tensor(x, device=z.device)[:, None, None, None] for x in strengths)
    seen = z.clone()
    seen[at] = rest + own * (z[at] - rest) + false * (other - rest)
    return seen
