"""When: the step, timestep and place in the schedule of a denoiser call.

A *step* is one entry of the scheduler's list of timesteps that the run really takes: img2img at
strength 0.6 takes 12 of 20, numbered from 0 to 11. A second-order scheduler has more of them than
`num_inference_steps` says: 7 for 4. Steps are read from the denoiser's own timestep
argument and from the scheduler's calls, never by counting attention calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hookctl.arguments.values import is_list, number, shown
from hookctl.errors import InputError


@dataclass(frozen=True)
class Clock:
    """The time of one denoiser call.

    step: which step it belongs to, from 0 (the noisiest of this run) to steps - 1.
    steps: how many this run takes, 0 if unknown.
    timestep: the scheduler's own: training steps (999 .. 0), or 1000 sigma for flow matching. What
        a denoiser is told may be another number (Flux: sigma, Z-Image: 1 - sigma); without a
        scheduler it is that, or 1 - that where it rises.
    skipped: how many entries of the scheduler's timesteps lie before the run.
    """

    step: int
    steps: int
    timestep: float
    skipped: int = 0

    @property
    def entry(self) -> int:
        """The step's place in the scheduler's own list of timesteps."""
        return self.skipped + self.step

    @property
    def fraction(self) -> float:
        """How much of the run is behind this call, 0 <= fraction < 1."""
        return self.step / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Window:
    """A span of the schedule: the steps with start <= step / steps < stop.

    start, stop: fractions of the schedule, 0 (the noisiest step) to 1; rounded down to steps.
    """

    start: float = 0.0
    stop: float = 1.0

    @classmethod
    def of(cls, value: Any, name: str) -> Window:
        """Read a window from a number b (meaning 0..b) or a pair; `name` is for the error."""
        pair = value if is_list(value) else (0.0, value)
        try:
            start, stop = (number(x, name) for x in pair)
        except ValueError:  # of their number, or of one of them
            raise InputError(
                f"{name}={shown(value)} is not a window; give a fraction of the schedule such as "
                "0.8, or a pair such as (0.2, 0.8)"
            ) from None
        if not 0.0 <= start <= 1.0 or not 0.0 <= stop <= 1.0 or start > stop:
            raise InputError(
                f"{name}={shown(value)} is outside the schedule; give fractions with "
                "0 <= start <= stop <= 1"
            )
        return cls(start, stop)

    def holds(self, clock: Clock) -> bool:
        """Whether the step of a denoiser call is in the span."""
        # A whole number of steps: int(b * steps) is the published rule (Prompt-to-Prompt).
        if not clock.steps:
            return self.start <= 0.0 < self.stop
        return _steps(self.start, clock) <= clock.step < _steps(self.stop, clock)

    def overlaps(self, other: Window) -> bool:
        """Whether some fraction of the schedule is in both."""
        return max(self.start, other.start) < min(self.stop, other.stop)


def _steps(fraction: float, clock: Clock) -> int:
    return int(fraction * clock.steps + 1e-9)  # 0.29 * 100 is 28.999999999999996


class Timekeeper:
    """Follows one run of a pipeline from its denoiser calls and scheduler steps."""

    def __init__(self) -> None:
        self._schedule: Any = None
        self._version: int | None = None
        self._list: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Forget the run; the next denoiser call starts a new one."""
        self._step = self._first = -1
        self._timestep: float | None = None
        self._taken = 0  # steps of the scheduler since the last denoiser call
        self.calls = 0

    @property
    def running(self) -> bool:
        """Whether the denoiser was called since the start."""
        return self._step >= 0

    def advance(self) -> None:
        """The scheduler took its step: the next denoiser call belongs to a new one."""
        self._taken += 1

    def read(self, timestep: Any, schedule: Any = None, planned: Any = None) -> Clock:
        """The clock of a denoiser call that received `timestep`.

        schedule: the scheduler's timesteps, [steps], or None for a bare denoiser; planned: how many
        of them the pipeline says it will take, None if it doesn't.
        """
        now, times, tolerance = _scalar(timestep), self._times(schedule), _tolerance(timestep)
        if self._begins_anew(now, times, max(1e-3, tolerance)):
            self.restart()
        if now == self._timestep and not self._taken and schedule is not None:
            self.calls += 1
        else:
            following = self._step + 1
            if self._taken != 1 or not 0 < following < len(times):
                following = _find(now, times, following, tolerance)
            self._step = following
            if self._first < 0:
                self._first = self._step
            self._timestep = now
            self._taken = self.calls = 0
        left = max(0, len(times) - self._first)
        steps = planned if isinstance(planned, int) and 0 < planned <= left else left
        time = times[self._step] if self._step < len(times) else now
        return Clock(self._step - self._first, steps, time, self._first)

    def _begins_anew(self, now: float, times: list[float], tolerance: float) -> bool:
        """Whether a call is the first of another run: timesteps fall within one, and it has no more
        than the list has."""
        if self._timestep is None:
            return False
        rises = now > self._timestep + 1e-6
        if not times:
            return rises
        over = self._taken > 0 and self._step + 1 >= len(times)
        return (rises or over) and _distance(times[0], now) <= tolerance

    def peek(self, timestep: Any, schedule: Any, outer: Clock) -> Clock:
        """The clock of a call that an editor makes inside the call at `outer`; moves nothing."""
        now, times = _scalar(timestep), self._times(schedule)
        if now == outer.timestep or (now == self._timestep and outer.entry == self._step):
            return outer
        entry = _nearest(now, times, 0, _tolerance(timestep))
        if entry is None:
            return replace(outer, timestep=now)
        return replace(outer, step=max(0, entry - outer.skipped), timestep=times[entry])

    def _times(self, schedule: Any) -> list[float]:
        """The schedule as numbers; read off the device once for each list."""
        version = getattr(schedule, "_version", None)
        if schedule is not self._schedule or version != self._version:
            values = schedule.tolist() if hasattr(schedule, "tolist") else schedule
            self._list = [] if values is None else [float(t) for t in values]
            self._schedule, self._version = schedule, version
        return self._list


# Some families divide the timestep before they call the denoiser (Flux: by 1000).
_UNITS = (1.0, 1000.0)


def _find(now: float, times: list[float], first: int, tolerance: float) -> int:
    """The step of a call with timestep `now`, when steps before `first` are over."""
    if not times:
        return first
    if 0 < first < len(times) and _distance(times[first], now) <= tolerance:
        return first
    found = _nearest(now, times, first, tolerance)
    return min(first, len(times) - 1) if found is None else found


def _nearest(now: float, times: list[float], first: int, tolerance: float) -> int | None:
    steps = range(first, len(times))
    best = min(steps, key=lambda step: _distance(times[step], now), default=None)
    return best if best is not None and _distance(times[best], now) <= tolerance else None


def _distance(time: float, now: float) -> float:
    return min(abs(time - now * unit) for unit in _UNITS) / max(1.0, abs(time))


def _tolerance(timestep: Any) -> float:
    """How far a timestep may be from its entry in the schedule: half precision rounds it."""
    half = isinstance(timestep, torch.Tensor) and timestep.dtype in (torch.float16, torch.bfloat16)
    return 8e-3 if half else 5e-4


def _scalar(value: Any) -> float:
    if isinstance(value, torch.Tensor):
        # Where each token has its own, those of given images are 0.
        return float(value.max()) if value.numel() else 0.0
    return float(value if value is not None else 0.0)
