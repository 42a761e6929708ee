"""A scheduler's steps at any place of its schedule, in any order.

Multistep solvers remember past predictions, and most schedulers count their steps. A program that
goes back, or two programs on one pipeline, would confuse them; so the state of the scheduler is
kept for every level that was reached, and put back before each step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hookctl.errors import UnsupportedError
from hookctl.loop.driven import Scaling
from hookctl.loop.noise import matches_flow

_NOISY = (
    "DPMSolverMultistepScheduler (for flow matching, where the pipeline takes it, with "
    "use_flow_sigmas=True, prediction_type='flow_prediction', algorithm_type='sde-dpmsolver++')"
)


class Solver:
    """The steps of a scheduler whose timesteps are set.

    entries: for every level but the last, those of `scheduler.timesteps` that lead from it to
    the next; several for solvers of second order.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.timesteps = list(scheduler.timesteps)
        self.entries = entries_of([float(t) for t in self.timesteps])
        self._accepted = _accepted(scheduler)
        self._fresh = _copied(scheduler)
        if "_step_index" in self._fresh:
            # Counted from the first model input, which the pipeline has made already.
            self._fresh["_step_index"] = None
        self._reached: dict[int, dict[str, Any]] = {}

    def enter(self, level: int) -> None:
        """Put the scheduler into the state it had at a level, or into that of a start there."""
        state = self._reached.get(level)
        self.scheduler.__dict__.update(_copy(self._fresh if state is None else state))
        if state is None and level and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.entries[level][0])

    def leave(self, level: int) -> None:
        """Keep the state that the scheduler is in now for the next step from a level."""
        self._reached[level] = _copied(self.scheduler)

    def forget(self) -> None:
        """Every level's next step is a first one."""
        self._reached.clear()

    def scaling(self, latents: Tensor, entry: int) -> Scaling | None:
        """How the scheduler makes the model input of an entry, None if it takes latents as they
        are.

        latents: [rows, ...] of the denoiser call.
        """
        if not hasattr(self.scheduler, "scale_model_input"):
            return None
        time = self.timesteps[entry]
        return Scaling(latents, lambda x: self.scheduler.scale_model_input(x, time))

    def step(
        self,
        prediction: Tensor,
        entry: int,
        latents: Tensor,
        *,
        eta: float = 0.0,
        generator: Any = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """One step of the scheduler: latents at the next entry.

        eta: share of fresh noise (DDIM's); noise: used in place of noise from `generator`.
        Raises UnsupportedError where the scheduler doesn't take what is asked for.
        """
        given = {"eta": eta, "generator": generator}
        if eta and noise is None:
            require_eta(self.scheduler, "eta")
        if noise is not None:
            self._require("variance_noise", f"DDIMScheduler or {_NOISY}")
            given |= {"variance_noise": noise.to(latents), "generator": None}
        known = {name: value for name, value in given.items() if name in self._accepted}
        out = self.scheduler.step(
            prediction, self.timesteps[entry], latents, **known, return_dict=False
        )
        stepped: Tensor = out[0]
        return stepped

    def at(self, level: int, prediction: Tensor, latents: Tensor, **options: Any) -> Tensor:
        """The step from a level, in the state kept for it; `options` as for `step`."""
        self.enter(level)
        return self.step(prediction, self.entries[level][0], latents, **options)

    def spread(self, level: int, like: Tensor, eta: float) -> float:
        """The standard deviation of the fresh noise in the step from a level."""
        zero = torch.zeros_like(like[:1])
        noise = [self.at(level, zero, zero, eta=eta, noise=zero + n) for n in (0.0, 1.0)]
        return float((noise[1] - noise[0]).float().mean())

    def _require(self, argument: str, cure: str) -> None:
        if argument not in self._accepted:
            raise UnsupportedError(
                f"{type(self.scheduler).__name__}.step takes no {argument}; use {cure}"
            )


def _accepted(scheduler: Any) -> frozenset[str]:
    """Arguments of a scheduler's step."""
    # Of the class too: what somebody put in the place of its step may take any arguments.
    steps = (scheduler.step, type(scheduler).step)
    return frozenset(name for step in steps for name in inspect.signature(step).parameters)


def require_eta(scheduler: Any, what: str) -> None:
    """Raise UnsupportedError, naming what asks for it, unless a scheduler's steps take a share of
    fresh noise."""
    if "eta" not in _accepted(scheduler):
        cure = "0" if matches_flow(scheduler) else "0, or the pipeline a DDIMScheduler"
        raise UnsupportedError(
            f"{what}: {type(scheduler).__name__}.step takes no eta, a share of fresh noise; give "
            f"{cure}"
        )


def entries_of(times: list[float]) -> list[range]:
    """Which entries of a list of timesteps make up the step from each distinct timestep.

    A timestep that comes twice (Heun, PNDM) corrects the step to it before it starts its own.
    """
    last = {time: entry for entry, time in enumerate(times)}
    starts = list(last.values())
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(times)], strict=True)]


def _copied(scheduler: Any) -> dict[str, Any]:
    """The scheduler's state; hooks on its methods are not part of it."""
    return _copy({k: v for k, v in vars(scheduler).items() if not callable(v)})


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose lists and latents are its own; schedules keep their identity."""
    return {
        name: list(value)
        if isinstance(value, list)
        else value.clone()
        if isinstance(value, Tensor) and value.dim() > 1
        else value
        for name, value in state.items()
    }


_NONE: Mapping[str, Any] = {}


class OwnSolver:
    """A copy of a scheduler whose timesteps are set, stepped entry by entry.

    seed: of the noise that its steps draw, if they draw any; two of one seed draw the same.
    """

    def __init__(self, scheduler: Any, seed: int = 0) -> None:
        self.solver = Solver(copy.deepcopy(scheduler))
        self._generator = torch.Generator().manual_seed(seed)
        self._levels = {e: i for i, entries in enumerate(self.solver.entries) for e in entries}

    @property
    def remembers(self) -> bool:
        """Whether a step depends on those before it: the scheduler holds latents."""
        held = [
            item
            for value in vars(self.solver.scheduler).values()
            for item in (value if isinstance(value, list | tuple) else [value])
        ]
        return any(isinstance(item, Tensor) and item.dim() > 1 for item in held)

    def model_input(self, latents: Tensor, entry: int) -> Tensor:
        """What the denoiser is given of latents at an entry, [rows, ...]."""
        self._enter(entry)
        scaling = self.solver.scaling(latents, entry)
        return latents if scaling is None else scaling.again(latents)

    def step(
        self, prediction: Tensor, entry: int, latents: Tensor, options: Mapping[str, Any] = _NONE
    ) -> Tensor:
        """Latents at the next step. options: further ones of the pipeline's step, such as eta."""
        self._enter(entry)
        self.solver.scaling(latents, entry)
        stepped = self.solver.step(
            prediction,
            entry,
            latents,
            eta=options.get("eta") or 0.0,
            noise=options.get("variance_noise"),
            generator=self._generator,
        )
        level = self._levels[entry]
        if entry == self.solver.entries[level][-1]:
            self.solver.leave(level + 1)
        return stepped

    def _enter(self, entry: int) -> None:
        level = self._levels[entry]
        if entry == self.solver.entries[level][0]:
            self.solver.enter(level)
