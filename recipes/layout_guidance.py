"""Layout guidance, backward: words to boxes by the share of attention that lies inside.

Chen, Laina, Vedaldi, "Training-Free Layout Control with Cross-Attention Guidance", arXiv 2304.03373
(WACV 2024). With A the map of one head at one site,

    L = mean over sites, objects, tokens and heads of (1 - sum_inside A / sum A)^2
    x <- x - 30 sigma^2 grad_x L       up to 5 times a step, while L > 0.2, in the first fifth

in sigma space; in alpha-bar space that is a step of 30 (1 - alpha_bar), and in any space
30 noise^2. `form="top-k"` is the energy of LLM-grounded diffusion (Lian et al., arXiv 2305.13655):

    L = mean of (1 - top_P(A m)) + top_P(A (1 - m)),   x <- x - 20 sqrt(1 - alpha_bar) grad_x L

up to 3, 2 and 1 times a step in the first, second and third tenth of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any, Literal

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.per_prompt import Regions
from hookctl.address.sites import Site
from hookctl.arguments import checked, number, one_of, whole
from hookctl.loop.energy import ImageMaps
from hookctl.loop.noise import Level
from hookctl.loop.state import State
from hookctl.recipes.common.energy.energy_guidance import EnergyGuidance, Stage, variance
from hookctl.recipes.common.energy.map_functions import inside_share, top_mean
from hookctl.recipes.common.energy.word_energy import Subject, Words
from hookctl.run_state import RunState

TOP = 0.2  # share of the cells that form="top-k" looks at
TOP_K_ITERATIONS = ((0.1, 3), (0.2, 2), (1.0, 1))  # until this fraction of the schedule

Form = Literal["share", "top-k"]
FORMS = ("share", "top-k")


class LayoutGuidance(EnergyGuidance):
    """Draw the attention of words into regions.

        LayoutGuidance(["circle", "square"], [(0, 0, 0.5, 1), (0.5, 0, 1, 1)])

    words, regions: as many of each, for every prompt or a list for each (several boxes for a word:
    `a | b`). form: which energy L is lowered, "share" (of a word's attention that lies inside) or
    "top-k" (the strongest cells alone). scale: of the gradient, by default 30 (20 for top-k).
    threshold: L below which a step is left alone. iterations: at most so many times in a step, by
    default 5 (3, 2, 1 for top-k). sites: by default all that hold the layout. start, stop:
    fractions of the schedule, by default 0 to 1/5 (3/10 for top-k). paper: the official code, which
    reads the middle block and the up-sites that hold the layout, floors the edges of boxes to cells
    (else a cell counts that is half covered), takes a step before it looks at L, and never guides
    an image again once its L was low enough.
    scale=0, or no words, leaves a run bit for bit as it was.
    """

    heads = True
    _last_loss: RunState[Tensor | None] = RunState(None)

    @checked(own=("regions",))
    def __init__(
        self,
        words: Words,
        regions: Regions,
        *,
        form: Form = "share",
        scale: float | None = None,
        threshold: float = 0.2,
        iterations: int | None = None,
        stop: float | None = None,
        paper: bool = False,
        **options: Any,
    ) -> None:
        one_of(form, "LayoutGuidance: form", FORMS)
        by_share = form == "share"
        scale = (30.0 if by_share else 20.0) if scale is None else scale
        self.default_stop = 0.2 if by_share else 0.3
        super().__init__(words, scale=scale, stop=stop, **options)
        self.set_regions(regions)
        if iterations is not None:
            iterations = whole(iterations, "LayoutGuidance: iterations", 1)
        self.threshold = number(threshold, "LayoutGuidance: threshold", low=0)
        self.form, self.iterations, self.paper = form, iterations, paper
        self.edges = floor if paper else None

    def begin(self, state: State) -> None:
        super().begin(state)
        self._last_loss = None

    def layout_sites(self, state: State) -> Sequence[Site]:
        fine = super().layout_sites(state)
        if not self.paper or self.given_sites is not None:
            return fine
        middle = [site for site in self._text_sites if site.place == "mid"]
        return middle + [site for site in fine if site.place == "up"] or fine

    def energy(self, image: ImageMaps, subjects: Sequence[Subject], stage: Stage) -> Tensor:
        parts = [
            self._loss(maps[..., list(subject.columns)], subject.mask(maps, self.edges))
            for maps in image.maps.values()
            for subject in subjects
        ]
        loss = torch.stack(parts).mean()
        return torch.stack([self.scale * loss, loss])

    def _loss(self, maps: Tensor, mask: Tensor) -> Tensor:
        """One object at one site: maps [frames, heads, height, width, tokens], mask [h, w]."""
        flat, inside = maps.movedim(-1, 0).flatten(-2), mask.flatten()
        if self.form == "share":
            return ((1 - inside_share(flat, inside)) ** 2).mean()
        losses = [
            1 - top_mean(map_ * inside, inside, TOP)
            + top_mean(map_ * (1 - inside), 1 - inside, TOP)
            for map_ in flat.flatten(0, -2)
        ]  # fmt: skip
        return torch.stack(losses).mean()

    def step_size(self, clock: Clock, level: Level) -> float:
        # The scale is in the energy, as published.
        return level.noise * (level.noise if self.form == "share" else variance(level) ** 0.5)

    def refinement(self, clock: Clock) -> tuple[float, int]:
        top_k = next((n for until, n in TOP_K_ITERATIONS if clock.fraction < until), 1)
        iterations = self.iterations or (5 if self.form == "share" else top_k)
        return self.threshold, iterations

    def updates(self, clock: Clock) -> bool:
        return False

    def descend(self, state: State) -> Tensor:
        if not self.paper:
            return super().descend(state)
        x = state.latents
        if self._last_loss is None:
            self._last_loss = torch.full((len(x),), torch.inf, device=x.device)
        for _ in range(self.refinement(state.clock)[1]):
            active = self._last_loss > self.threshold
            if not active.any():
                break
            found = self.energies_at(state, x, ["refine"] * len(x))
            x = self.stepped(state, x, found, active)
            self._last_loss = torch.where(active, found.terms[:, -1], self._last_loss)
        return x
