"""Layout guidance, backward: words to boxes by the share of attention that lies inside.

Chen, Laina, Vedaldi, "Training-Free Layout Control with Cross-Attention Guidance", arXiv 2304.03373
(WACV 2024). With A the map of one head at one site,

    L = mean over sites, objects, tokens and heads of (1 - sum_inside A / sum A)^2
    x <- x - 30 sigma^2 grad_x L       up to 5 times a step, while L > 0.2, in the first fifth

in sigma space; in alpha-bar space that is a step of 30 (1 - alpha_bar), and in any space
30 noise^2. `form="top-k"` is the energy of LLM-grounded diffusion (Lian et al., arXiv 2305.13655):

    L = mean of (1 - top_P(A m)) + top_P(A (1 - m)),   x <- x - 20 sqrt(1 - alpha_bar) grad_x L

with 3, 2 and 1 steps a step in the first three tenths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.sites import Selector, Site
from hookctl.errors import InputError
from hookctl.loop.energy import ImageMaps
from hookctl.loop.noise import Level
from hookctl.loop.state import State
from hookctl.recipes.box_diff import top_mean
from hookctl.recipes.common.energy_guidance import (
    EnergyGuidance,
    Stage,
    Subject,
    Words,
    variance,
    whole,
)
from hookctl.recipes.common.perturbed_guidance import number
from hookctl.recipes.common.places import Places

TOP = 0.2  # share of the cells that form="top-k" looks at
FEWER = ((0.1, 3), (0.2, 2), (1.0, 1))  # until this fraction of the schedule, steps a step

Form = Literal["share", "top-k"]


class LayoutGuidance(EnergyGuidance):
    """Draw the attention of words into regions.

    words, regions: as many of each, for every prompt or a list for each (several boxes for a word:
    `a | b`). scale: of the step, 30 (20 for top-k); threshold: of L; iterations: at most so many
    steps a step, by default 5 (3, 2, 1 for top-k); sites: by default all that hold the layout;
    start, stop: 0 to 1/5 of the schedule (3/10 for top-k). paper: the official code, which reads
    the middle block and the up-sites that hold the layout, takes a step before it looks at L, and
    never guides an image again once its L was low enough. scale=0, or no words, leaves a run bit
    for bit as it was.
    """

    heads = True

    def __init__(
        self,
        words: Words,
        regions: Places,
        *,
        form: Form = "share",
        scale: float | None = None,
        threshold: float = 0.2,
        iterations: int | None = None,
        sites: Selector = None,
        start: float = 0.0,
        stop: float | None = None,
        paper: bool = False,
    ) -> None:
        if form not in ("share", "top-k"):
            raise InputError(f"LayoutGuidance: form={form!r}; give 'share' or 'top-k'")
        share = form == "share"
        scale = (30.0 if share else 20.0) if scale is None else scale
        stop = (0.2 if share else 0.3) if stop is None else stop
        super().__init__(words, regions, scale, sites, start, stop)
        if iterations is not None:
            whole(iterations, "LayoutGuidance: iterations", 1)
        self.threshold = number(threshold, "LayoutGuidance: threshold")
        self.form, self.iterations, self.paper = form, iterations, paper
        self._reached: Tensor | None = None

    def begin(self, state: State) -> None:
        super().begin(state)
        self._reached = None

    def layout_sites(self, state: State) -> Sequence[Site]:
        fine = super().layout_sites(state)
        if not self.paper or self.chosen is not None:
            return fine
        middle = [s for s in self._sites if s.place == "mid" and s.kind in ("cross", "joint")]
        return middle + [s for s in fine if s.place == "up"] or fine

    def energy(self, image: ImageMaps, subjects: Sequence[Subject], stage: Stage) -> Tensor:
        parts = [
            self._one(maps[..., list(subject.columns)], subject.mask(maps))
            for maps in image.maps.values()
            for subject in subjects
        ]
        loss = torch.stack(parts).mean()
        return torch.stack([self.scale * loss, loss])

    def _one(self, maps: Tensor, mask: Tensor) -> Tensor:
        """One object at one site: maps [frames, heads, height, width, tokens], mask [h, w]."""
        flat, inside = maps.movedim(-1, 0).flatten(-2), mask.flatten()
        if self.form == "share":
            # A head that gives a token nothing anywhere gives the box nothing: a share of 0.
            whole = flat.sum(-1).clamp_min(torch.finfo(flat.dtype).tiny)
            return ((1 - (flat * inside).sum(-1) / whole) ** 2).mean()
        each = [
            1 - top_mean(one * inside, inside, TOP) + top_mean(one * (1 - inside), 1 - inside, TOP)
            for one in flat.flatten(0, -2)
        ]
        return torch.stack(each).mean()

    def step(self, clock: Clock, level: Level) -> float:
        # The scale is in the energy, as published.
        return level.noise * (level.noise if self.form == "share" else variance(level) ** 0.5)

    def refinement(self, clock: Clock) -> tuple[float, int]:
        fewer = next((n for until, n in FEWER if clock.fraction < until), 1)
        most = self.iterations or (5 if self.form == "share" else fewer)
        return self.threshold, most

    def updates(self, clock: Clock) -> bool:
        return False

    def guided(self, state: State) -> Tensor:
        if not self.paper:
            return super().guided(state)
        x = state.latents
        if self._reached is None:
            self._reached = torch.full((len(x),), torch.inf, device=x.device)
        for _ in range(self.refinement(state.clock)[1]):
            going = self._reached > self.threshold
            if not going.any():
                break
            found = self._energies(state, x, ["refine"] * len(x))
            x = self._stepped(state, x, found, going)
            self._reached = torch.where(going, found.terms[:, -1], self._reached)
        return x
