"""Attend-and-Excite's maps, steps and refinements, for any energy of the maps.

Chefer et al., arXiv 2301.13826 (SIGGRAPH 2023). With A the mean map of the layout's sites, of all
tokens but the first and the last, and G a Gaussian of 3 x 3 cells,

    p = softmax(100 A) over tokens,   M_j = G * p_j                     the map of subject j
    rho_i = scale linspace(1, decay)_i                                  the step sizes

BoxDiff (Xie et al., arXiv 2307.10816) has the same maps and steps under an energy of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.arguments import checked, number, refusal, whole
from hookctl.editor import Claim
from hookctl.loop.energy import ImageMaps
from hookctl.loop.noise import Level
from hookctl.recipes.common.energy.energy_guidance import EnergyGuidance, variance
from hookctl.recipes.common.energy.map_functions import mean_map, smoothed
from hookctl.recipes.common.energy.word_energy import Subject, Words

# Fraction of the schedule -> how much attention every subject must have by then.
THRESHOLDS: Mapping[float, float] = {0.0: 0.05, 0.2: 0.5, 0.4: 0.8}

SHARPNESS = 100.0  # of the softmax over tokens


class ExcitedMaps(EnergyGuidance):
    """Base of recipes whose maps and steps are Attend-and-Excite's.

    words: the subjects, for every prompt or a list for each. scale, decay: rho falls from scale to
    scale * decay over the schedule. thresholds: fraction of the schedule -> the attention that is
    refined to at that step; refinements: at most so many rounds each time. sigma: of the Gaussian,
    in cells, 0 for none. sites: see `WordEnergy`. start, stop: fractions of the schedule, between
    which every step is updated, and the default thresholds are refined to; those that are given
    are refined to wherever they are. paper: the official code, where rho is
    scale * sqrt(linspace(1, decay)), the Gaussian is sqrt(2) wider than named, a round of a
    refinement takes its step before it looks at the threshold (so that there is one more), and no
    threshold depends on `stop`.
    """

    reads_all_tokens = True
    default_stop = 0.5

    @checked()
    def __init__(
        self,
        words: Words,
        *,
        scale: float = 20.0,
        decay: float = 0.5,
        thresholds: Mapping[float, float] | None = None,
        refinements: int = 20,
        sigma: float = 0.5,
        paper: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(words, scale=scale, **options)
        if thresholds is None:
            thresholds = {f: a for f, a in THRESHOLDS.items() if paper or f < self.stop}
        self.thresholds = dict(thresholds)
        for fraction, attention in self.thresholds.items():
            # Tables of a file have texts for keys.
            if not 0 <= float(fraction) <= 1 or not 0 <= attention <= 1:
                raise refusal(
                    f"{self.name}: thresholds",
                    self.thresholds,
                    "fractions of the schedule and of the attention, such as {0.2: 0.5}",
                )
        self.decay = number(decay, f"{self.name}: decay", low=0)
        self.sigma = number(sigma, f"{self.name}: sigma", low=0) * (2**0.5 if paper else 1)
        self.refinements = whole(refinements, f"{self.name}: refinements")
        self.paper = self.tests_late = paper

    def claims(self) -> Sequence[Claim]:
        beyond = self.scale and any(float(f) >= self.stop for f in self.thresholds)
        window = Window(self.start, 1.0) if beyond else self.window()
        return [replace(claim, window=window) for claim in super().claims()]

    def active(self, clock: Clock) -> bool:
        begun = clock.step >= int(self.start * clock.steps + 1e-9)
        return self.updates(clock) or (begun and self.refinement(clock)[1] > 0)

    def updates(self, clock: Clock) -> bool:
        return super().active(clock)

    def step_size(self, clock: Clock, level: Level) -> float:
        passed = clock.step / max(clock.steps - 1, 1)
        fall = 1 + (self.decay - 1) * passed
        return self.scale * (fall**0.5 if self.paper else fall) * variance(level)

    def refinement(self, clock: Clock) -> tuple[float, int]:
        now = [
            attention
            for fraction, attention in self.thresholds.items()
            if clock.step == int(float(fraction) * clock.steps + 1e-9)
        ]
        # In a run of a few steps several fall on one: the last word is the strictest.
        return (1 - max(now), self.refinements) if now else (0.0, 0)

    def excited(self, image: ImageMaps, subjects: Sequence[Subject]) -> Tensor:
        """M of each subject, [subjects, frames, height, width]."""
        p = (SHARPNESS * mean_map(image.maps)).softmax(-1)
        maps = torch.stack([p[..., list(subject.columns)].sum(-1) for subject in subjects])
        return smoothed(maps, self.sigma) if self.sigma else maps
