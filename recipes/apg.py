"""APG: guidance whose part along the conditional prediction is weakened.

Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
Models", arXiv 2410.02416 (ICLR 2025), algorithm 1. With d = c - u of an image,

    r <- d + beta r          momentum over the steps, against the last direction if negative
    d <- r min(1, rho / |r|)
    c + (g - 1) (d_across + eta d_along)    d_along: d's part along c, which saturates colours

The paper takes c and u as predictions of the clean image, diffusers' guider as they come. That
starts from u instead, u + g (d_across + eta d_along), so that what is taken from d is missing even
at g = 1: where the limit rho leaves little of d, little of the prompt is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hookctl.arguments import checked, number, one_of
from hookctl.errors import InputError
from hookctl.loop.noise import Noise, level_of
from hookctl.loop.state import State
from hookctl.recipes.common.guidance_rule import GuidanceRule, Guided, inner
from hookctl.run_state import RunState

SPACES = ("clean", "prediction")


class APG(GuidanceRule):
    """Adaptive projected guidance in the place of the pipeline's.

    eta: how much of the part along c is kept; 0 as published, 1 for all. momentum: share
        beta of the last steps' r that stays, below 0 against their direction; 0 for none.
    rho: the largest norm of d over an image, None for any; it grows with the square root of the
        latents' number (15 is the paper's for SDXL, whose latents are 4 x 128 x 128).
    space: "clean", the paper's, or "prediction", as diffusers' guider (see above).
    strength: 1 as published, 0 for the pipeline's own guidance; start, stop: a window, outside of
    which the pipeline's own guidance is left, and at whose beginning the momentum is none. Costs
    nothing.

    What Qwen-Image and Z-Image make of their sum (norms, a cap) they make of the rule's; Z-Image's
    scale s is read as g = s + 1. Raises UnsupportedError for a run without guidance, and for
    pipelines that guide in another way.
    """

    _sum: RunState[Tensor | None] = RunState(None)  # r
    _noise: RunState[Noise | None] = RunState(None)

    @checked()
    def __init__(
        self,
        eta: float = 0.0,
        momentum: float = -0.5,
        rho: float | None = 15.0,
        *,
        space: str = "clean",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.eta = number(eta, "APG: eta")
        self.momentum = number(momentum, "APG: momentum")
        self.rho = rho
        if rho is not None and number(rho, "APG: rho", low=0) == 0:
            raise InputError("APG: rho=0 would leave no guidance; give None for no limit")
        self.space = one_of(space, "APG: space", SPACES)

    def neutral(self) -> bool:
        return super().neutral() or (self.eta == 1 and not self.momentum and self.rho is None)

    def attach(self, target: Any) -> None:
        scheduler = getattr(target, "scheduler", None)
        if self.space == "clean":
            if scheduler is None:
                raise InputError("APG needs the pipeline's scheduler; control the pipeline itself")
            self._noise = Noise(scheduler)

    def begin(self, state: State) -> None:
        self._sum = None

    def term(self, step: Guided) -> Tensor:
        scale, along = self._clean(step)
        d = r = step.d / scale
        if self.momentum:
            before = self._sum
            self._sum = r = d if before is None else d + self.momentum * before
        if self.rho is not None:
            r = r * (self.rho / inner(r, r).sqrt().clamp(min=1e-12)).clamp(max=1)
        size = inner(along, along)
        share = torch.where(size > 0, inner(r, along) / size, torch.zeros_like(size))
        new = r - (1 - self.eta) * share * along
        of_u = self.space == "prediction"
        return (step.g if of_u else step.g - 1) * (new - d) * scale

    def _clean(self, step: Guided) -> tuple[float, Tensor]:
        """(what a difference of clean images is multiplied by in predictions, c as such)."""
        noise, state = self._noise, step.state
        if noise is None:
            return 1.0, step.c
        level = level_of(state)  # some families tell the denoiser a time of their own
        one = torch.ones((), dtype=torch.float64)
        # At fixed latents a x0 + s eps, a change of x0 by 1 is one of eps by -a / s.
        scale = float(noise.join(one, -level.signal / max(level.noise, 1e-8) * one, level))
        return scale, noise.split(state.latents.to(step.c), step.c, level)[0]
