"""What a model predicts in a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hookctl.loop.noise import Noise, level_of
from hookctl.loop.state import State


@dataclass(frozen=True, eq=False)
class ModelPrediction:
    """What a model predicts in a step, [images, ...]: conditional, guided, and of which latents."""

    cond: Tensor
    guided: Tensor
    latents: Tensor

    def trial_step(self, state: State) -> Tensor:
        """Where the conditional prediction leads by a deterministic step of first order, in the
        scheduler's space; no solver is touched."""
        noise = Noise(state.pipe.scheduler)
        there = noise.after(state.pipe.scheduler.timesteps[state.clock.entry])
        return there.mix(*noise.split(self.latents, self.cond, level_of(state)))
