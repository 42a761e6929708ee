"""Guidance by an energy of attention maps: what the box and subject recipes share.

Before a step's denoiser call, while an editor's window lasts,

    x <- x - rho grad_x L(maps of x)

once, or again and again until the energy is low enough (refinement). Every image of a batch has
its own energy and stops by itself. What the papers say of latents in alpha-bar space holds for
sigma space and flows too: with x at a level of signal a and noise s, x / r, r^2 = a^2 + s^2, is
where their step is taken, and a step rho there is a step r^2 rho here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import COND
from hookctl.arguments import checked, number
from hookctl.errors import UnsupportedError
from hookctl.loop.energy import Energies, ImageMaps
from hookctl.loop.noise import Level, level_of
from hookctl.loop.state import State
from hookctl.recipes.common.energy.word_energy import Subject, WordEnergy, Words
from hookctl.run_state import RunState

# What an energy is asked for: one more round of a refinement; the update of every step; the update
# of a step in which there was a refinement.
Stage = Literal["refine", "update", "refined"]


class EnergyGuidance(WordEnergy, ABC):
    """An editor that moves latents down the gradient of an energy.

    words, sites: see `WordEnergy`. scale: factor of the steps, 0 for none; start, stop: fractions
    of the schedule, stop None for the recipe's own; a span that is not empty holds a step at least,
    however few a run has. After a run `record` holds (step, energies [images]) of every denoiser
    call that it made.
    """

    depends_on_stage = False  # the energy of an update is another one after a refinement
    tests_late = False  # a round of a refinement takes its step before it looks at the bound
    default_stop = 1.0
    record: RunState[list[tuple[int, Tensor]]] = RunState(factory=list)
    _last: RunState[tuple[Tensor, Tensor] | None] = RunState(None)

    @checked()
    def __init__(
        self,
        words: Words,
        *,
        scale: float,
        start: float = 0.0,
        stop: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(words, **options)
        self.scale = number(scale, f"{self.name}: scale", low=0)
        self.stops_by_default = stop is None
        self.start, self.stop = start, self.default_stop if stop is None else stop
        self.window()

    @abstractmethod
    def energy(self, image: ImageMaps, subjects: Sequence[Subject], stage: Stage) -> Tensor:
        """L of one image; or [L, what is compared with the bound of the refinement]."""

    @abstractmethod
    def step_size(self, clock: Clock, level: Level) -> float:
        """rho at this time, for latents in the scheduler's own space."""

    def refinement(self, clock: Clock) -> tuple[float, int]:
        """The bound below which a refinement ends, and how many rounds it may take."""
        return 0.0, 0

    def updates(self, clock: Clock) -> bool:
        """Whether a step is taken after the refinement, whatever the energy."""
        return True

    def active(self, clock: Clock) -> bool:
        if super().active(clock):
            return True
        # In a run of a few steps the span may be less than one; it is not nothing.
        first = int(self.start * clock.steps + 1e-9)
        return bool(clock.steps) and self.start < self.stop and clock.step == first

    def neutral(self) -> bool:
        return self.scale == 0 or not self.words.longest

    def begin(self, state: State) -> None:
        super().begin(state)
        self.record, self._last = [], None

    def before(self, state: State) -> None:
        latents = self.guided_latents(state)
        if latents is not None:
            state.latents = latents

    def guided_latents(self, state: State) -> Tensor | None:
        """The latents of a call after this step's guidance, None if they stay as they are.

        Raises UnsupportedError for a gradient that is not finite.
        """
        if self.scale == 0 or not self.subjects:
            return None
        latents = state.latents
        if self._last is not None and torch.equal(self._last[0], latents):
            return self._last[1]  # another call of the same step: of the other branch
        if not state.rows.where(branch=COND):
            return None
        guided = self.descend(state).to(latents)
        if not torch.isfinite(guided).all():
            raise UnsupportedError(
                f"{self.name}: the gradient in {state.dtype} isn't finite; "
                "run the denoiser in float32 or bfloat16, or lower scale="
            )
        self._last = latents, guided
        return guided

    def descend(self, state: State) -> Tensor:
        """The latents of a call after its refinement and its update, [images, ...]."""
        x, found = state.latents, None
        bound, rounds = self.refinement(state.clock)
        stages: list[Stage] = ["update"] * len(x)
        going: Tensor | None = None  # which images are still refined
        for _ in range(rounds):
            found = self.energies_at(state, x, ["refine"] * len(x))
            above = found.terms[:, -1] > bound
            active = going if self.tests_late and going is not None else above
            if not active.any():
                break
            x, found = self.stepped(state, x, found, active), None
            going = active & above
            stages = ["refined" if on else s for s, on in zip(stages, active.tolist(), strict=True)]
        if self.updates(state.clock):
            if found is None or self.depends_on_stage:
                found = self.energies_at(state, x, stages)
            x = self.stepped(state, x, found, found.values != 0)
        return x

    def energies_at(self, state: State, x: Tensor, stages: Sequence[Stage]) -> Energies:
        """The energies of latents x [images, ...] in a call; stages: of each image."""
        rows = state.rows.where(branch=COND)
        stage_of = {(r.prompt, r.image): stage for r, stage in zip(rows, stages, strict=True)}

        def scalar(image: ImageMaps) -> Tensor:
            row = image.row
            subjects = self.subjects.get(row.prompt, ())
            if not subjects:
                return image.latents.new_zeros(2)
            energy = self.energy(image, subjects, stage_of[row.prompt, row.image])
            return energy if energy.dim() else energy.repeat(2)

        found = self.energies_of(state, scalar, latents=x)
        self.record.append((state.clock.step, found.values))
        return found

    def stepped(self, state: State, x: Tensor, found: Energies, active: Tensor) -> Tensor:
        """x a step down the gradient; active: for which images, bool [images]."""
        assert found.gradient is not None
        rho = self.step_size(state.clock, level_of(state))
        gates = active.reshape(-1, *([1] * (x.dim() - 1)))
        return torch.where(gates, x - rho * found.gradient, x.to(found.gradient))


def variance(level: Level) -> float:
    """r^2 = a^2 + s^2, by which a step in alpha-bar space is multiplied for this level's space."""
    return level.signal**2 + level.noise**2
