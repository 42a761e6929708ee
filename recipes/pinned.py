"""The source kept on a stored trajectory, such as that of an inverted picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookctl.errors import InputError
from hookctl.loop.noise import Noise
from hookctl.loop.state import State


class Pinned:
    """Before every turn the latents of prompt 0 are set to those of a trajectory.

    trajectory: latents at the level of each timestep, noisiest first, [levels, channels, ...];
    further ones (the clean picture) are not used. earliest: no level before this one is taken, so
    that a run starts from a cleaner source. together: the other pictures start from the same noise.
    who: named in errors.
    """

    def __init__(
        self,
        trajectory: Tensor | Sequence[Tensor],
        who: str,
        *,
        earliest: int = 0,
        together: bool = False,
    ) -> None:
        levels = list(trajectory)
        if not levels or any(not isinstance(x, Tensor) for x in levels):
            raise InputError(f"{who}: trajectory holds no latents; give one tensor for each level")
        # An inversion of one picture may keep its batch dimension.
        flat = [x[0] if x.dim() == 4 and x.shape[0] == 1 else x for x in levels]
        self.trajectory, self.earliest, self.who = torch.stack(flat), earliest, who
        self.together = together

    def begin(self, state: State) -> None:
        """Check the trajectory against the run."""
        levels, shape = len(self.trajectory), tuple(self.trajectory.shape[1:])
        self._times = Noise(state.pipe.scheduler).timesteps
        if levels < len(self._times):
            raise InputError(
                f"{self.who}: trajectory has {levels} levels and this run {len(self._times)} "
                "timesteps; invert with as many steps"
            )
        if shape != tuple(state.latents.shape[1:]):
            raise InputError(
                f"{self.who}: trajectory is of latents {shape}; this run draws "
                f"{tuple(state.latents.shape[1:])}"
            )

    def before(self, state: State) -> None:
        now = state.clock.timestep
        level = min(range(len(self._times)), key=lambda i: abs(self._times[i] - now))
        latents = state.latents.clone()
        every = self.together and level == 0
        for row in state.pictures if every else state.pictures.where(prompt=0):
            latents[row.index] = self.trajectory[max(level, self.earliest)].to(latents)
        state.latents = latents
