"""When a program asks its denoiser: at a level of its run, or at any level of noise between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.arguments import number
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.noise import Level, Noise
from hookctl.loop.solver import Solver


@dataclass(frozen=True, eq=False)
class Moment:
    """One place of a schedule.

    time: the scheduler's timestep, 0-d; clock: what editors are told; size: by which the latents
    are divided for the denoiser.
    """

    time: Tensor
    clock: Clock
    size: float = 1.0


class Moments:
    """The places of one run, whose levels are these."""

    def __init__(self, solver: Solver, noise: Noise, levels: Sequence[Level]) -> None:
        self._solver, self._noise, self._levels = solver, noise, levels

    def at_entry(self, entry: int | None, start: int, size: float = 1.0) -> Moment:
        """At an entry of the scheduler's timesteps, None for the clean end.

        start: the level that the run begins at, from which editors count.
        """
        times = self._solver.timesteps
        clean = self._noise.time_of(torch.zeros_like(times[0]))
        time = clean if entry is None else times[entry]
        return Moment(time, self._clock(entry, float(time), start), size)

    def at_level(self, level: int, start: int) -> Moment:
        """At a level of the run, 0 (noisiest) to its steps. InputError for others."""
        last = len(self._levels) - 1
        if not 0 <= level <= last:
            raise InputError(f"level {level}; this run has the levels 0 to {last}")
        entry = self._solver.entries[level][0] if level < last else None
        size = 1.0 if self._noise.flow else self._levels[level].size
        return self.at_entry(entry, start, size)

    def at_sigma(self, sigma: float, start: int) -> Moment:
        """At a share of noise, 0 to 1; one that is a level of the run is that level.

        Raises UnsupportedError for schedulers that know their own timesteps alone.
        """
        if not self._noise.flow:
            name = type(self._solver.scheduler).__name__
            raise UnsupportedError(
                f"sigma={sigma!r}: {name} has no time between its timesteps; give a level, or use "
                "a flow-matching model"
            )
        share = number(sigma, "sigma", low=0, high=1)
        near = min(range(len(self._levels)), key=lambda i: abs(self._levels[i].noise - share))
        if abs(self._levels[near].noise - share) < 1e-6:
            return self.at_level(near, start)
        first = self._solver.timesteps[0]
        given = torch.tensor(share, dtype=torch.float32, device=first.device)
        time = self._noise.time_of(given)
        passed = [i for i, level in enumerate(self._levels) if level.noise > share]
        entry = self._solver.entries[min(passed[-1], len(self._levels) - 2)][0] if passed else 0
        return Moment(time, self._clock(entry, float(time), start))

    def _clock(self, entry: int | None, time: float, start: int) -> Clock:
        skipped = self._solver.entries[start][0]
        steps = len(self._solver.timesteps) - skipped
        step = steps - 1 if entry is None else max(0, entry - skipped)
        return Clock(step, steps, time, skipped)
