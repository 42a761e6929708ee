"""Attend-and-Excite: no subject of the prompt may be left out.

Chefer et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion
Models", arXiv 2301.13826 (SIGGRAPH 2023). With A the mean map of the layout's sites, of all tokens
but the first and the last,

    p = softmax(100 A) over tokens,  m_j = max of (G * p_j),  L = max_j max(0, 1 - m_j)
    x <- x - rho_i grad_x L,  rho_i = 20 linspace(1, 0.5)_i

in the first half of the schedule; at 0, 1/5 and 2/5 of it the step is repeated until every
m_j reaches 0.05, 0.5 and 0.8, at most 20 times. G is a Gaussian of 3 x 3 cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.sites import Selector
from hookctl.errors import InputError
from hookctl.loop.energy import ImageMaps
from hookctl.loop.noise import Level
from hookctl.recipes.common.energy_guidance import (
    EnergyGuidance,
    Stage,
    Subject,
    Words,
    mean_map,
    smoothed,
    variance,
    whole,
)
from hookctl.recipes.common.perturbed_guidance import number
from hookctl.recipes.common.places import Places

# Fraction of the schedule -> how much attention every subject must have by then.
THRESHOLDS: Mapping[float, float] = {0.0: 0.05, 0.2: 0.5, 0.4: 0.8}

SHARPNESS = 100.0  # of the softmax over tokens


class ExcitedMaps(EnergyGuidance):
    """Attend-and-Excite's schedule and maps, for any energy of them.

    thresholds: fraction of the schedule -> 1 - the bound that is refined to then; refinements: at
    most how often each time; scale, decay: rho falls from scale to scale * decay over the schedule;
    sigma: of the smoothing, in cells, 0 for none. paper: the official code, where rho is
    scale * sqrt(linspace(1, decay)) and the Gaussian is sqrt(2) wider than named.
    """

    whole_text = True

    def __init__(
        self,
        words: Words,
        regions: Places | None,
        *,
        scale: float,
        decay: float,
        thresholds: Mapping[float, float] | None,
        refinements: int,
        sigma: float,
        sites: Selector,
        start: float,
        stop: float,
        paper: bool,
    ) -> None:
        super().__init__(words, regions, scale, sites, start, stop)
        self.thresholds = dict(THRESHOLDS if thresholds is None else thresholds)
        for fraction, reach in self.thresholds.items():
            if not 0 <= float(fraction) <= 1 or not 0 <= reach <= 1:
                raise InputError(
                    f"{self.name}: thresholds={self.thresholds!r}; give fractions of the schedule "
                    "and of the attention, such as {0.2: 0.5}"
                )
        self.decay = number(decay, f"{self.name}: decay")
        self.sigma = number(sigma, f"{self.name}: sigma") * (2**0.5 if paper else 1)
        self.refinements = whole(refinements, f"{self.name}: refinements")
        self.paper = paper

    def step(self, clock: Clock, level: Level) -> float:
        share = clock.step / max(clock.steps - 1, 1)
        fall = 1 + (self.decay - 1) * share
        return self.scale * (fall**0.5 if self.paper else fall) * variance(level)

    def refinement(self, clock: Clock) -> tuple[float, int]:
        for fraction, reach in self.thresholds.items():
            if clock.step == int(float(fraction) * clock.steps + 1e-9):
                return 1 - reach, self.refinements
        return 0.0, 0

    def excited(self, image: ImageMaps, subjects: Sequence[Subject]) -> Tensor:
        """The smoothed share of attention of each subject: [subjects, frames, height, width]."""
        p = (SHARPNESS * mean_map(image.maps)).softmax(-1)
        maps = torch.stack([p[..., list(subject.columns)].sum(-1) for subject in subjects])
        return smoothed(maps, self.sigma) if self.sigma else maps


class AttendAndExcite(ExcitedMaps):
    """Push every subject to hold at least one place.

    words: the subjects, for every prompt or a list for each; thresholds, refinements, scale, decay,
    sigma, sites, start, stop: see `ExcitedMaps` and `WordEnergy`. paper: as there, and each token
    of a word is a subject of its own, where else the word is their sum. scale=0, or no words,
    leaves a run bit for bit as it was. Costs one partial forward and backward of the conditional
    rows per step, and as many again for each refinement.
    """

    def __init__(
        self,
        words: Words,
        *,
        scale: float = 20.0,
        decay: float = 0.5,
        thresholds: Mapping[float, float] | None = None,
        refinements: int = 20,
        sigma: float = 0.5,
        sites: Selector = None,
        start: float = 0.0,
        stop: float = 0.5,
        paper: bool = False,
    ) -> None:
        super().__init__(
            words,
            None,
            scale=scale,
            decay=decay,
            thresholds=thresholds,
            refinements=refinements,
            sigma=sigma,
            sites=sites,
            start=start,
            stop=stop,
            paper=paper,
        )

    def energy(self, image: ImageMaps, subjects: Sequence[Subject], stage: Stage) -> Tensor:
        if self.paper:
            subjects = [Subject(s.word, (column,)) for s in subjects for column in s.columns]
        highest = self.excited(image, subjects).flatten(1).amax(1)
        return (1 - highest).clamp_min(0).amax()
