"""Solvers beside the pipeline's: the same scheduler, with a history of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hookctl.loop.solver import Solver

_NONE: Mapping[str, Any] = {}


class OwnSolver:
    """A copy of a scheduler whose timesteps are set, stepped turn by turn.

    seed: of the noise that its steps draw, if they draw any; two of one seed draw the same.
    """

    def __init__(self, scheduler: Any, seed: int = 0) -> None:
        self.solver = Solver(copy.deepcopy(scheduler))
        self._generator = torch.Generator().manual_seed(seed)
        self._levels = {turn: i for i, turns in enumerate(self.solver.turns) for turn in turns}

    @property
    def remembers(self) -> bool:
        """Whether a step depends on those before it: the scheduler holds latents."""
        held = [
            item
            for value in vars(self.solver.scheduler).values()
            for item in (value if isinstance(value, list | tuple) else [value])
        ]
        return any(isinstance(item, Tensor) and item.dim() > 1 for item in held)

    def model_input(self, latents: Tensor, turn: int) -> Tensor:
        """What the denoiser is given of latents at a turn, [rows, ...]."""
        self._enter(turn)
        scaling = self.solver.scaling(latents, turn)
        return latents if scaling is None else scaling.again(latents)

    def step(
        self, prediction: Tensor, turn: int, latents: Tensor, options: Mapping[str, Any] = _NONE
    ) -> Tensor:
        """Latents at the next turn. options: further ones of the pipeline's step, such as eta."""
        self._enter(turn)
        self.solver.scaling(latents, turn)
        stepped = self.solver.step(
            prediction,
            turn,
            latents,
            eta=options.get("eta") or 0.0,
            noise=options.get("variance_noise"),
            generator=self._generator,
        )
        level = self._levels[turn]
        if turn == self.solver.turns[level][-1]:
            self.solver.leave(level + 1)
        return stepped

    def _enter(self, turn: int) -> None:
        level = self._levels[turn]
        if turn == self.solver.turns[level][0]:
            self.solver.enter(level)
