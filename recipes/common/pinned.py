"""The source kept on a path of latents, such as that of an inverted image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookctl.errors import InputError
from hookctl.loop.noise import Noise
from hookctl.loop.state import State

Path = Tensor | Sequence[Tensor]


class Pinned:
    """Before every step the latents of prompt 0 are set to those of a path.

    path: latents at the level of each timestep, noisiest first (`loop.inversion`), one image's,
    [channels, ...], or one for each image of a prompt, [1 | images, channels, ...]; further levels
    (the clean image) are not used. together: the other prompts start from the same noise.
    earliest: the first step takes this level and later ones none before the next, so that the
    source is cleaner than what is drawn. who: named in errors.
    """

    def __init__(self, path: Path, who: str, *, together: bool = False, earliest: int = 0) -> None:
        levels = list(path)
        if not levels or any(not isinstance(x, Tensor) or x.dim() < 2 for x in levels):
            raise InputError(f"{who}: path holds no latents; give one tensor for each level")
        self.path, self.who = torch.stack(levels), who
        self.together, self.earliest = together, earliest

    def begin(self, state: State) -> None:
        """Check the path against the run."""
        shape = tuple(state.latents.shape[1:])
        if tuple(self.path.shape[1:]) == shape:
            self.path = self.path[:, None]
        self._times = Noise(state.pipe.scheduler).timesteps
        if len(self.path) < len(self._times):
            raise InputError(
                f"{self.who}: path has {len(self.path)} levels and this run {len(self._times)} "
                "timesteps; invert with as many steps"
            )
        images = 1 + max(row.image for row in state.images)
        if tuple(self.path.shape[2:]) != shape or self.path.shape[1] not in (1, images):
            raise InputError(
                f"{self.who}: path is of latents {tuple(self.path.shape[1:])}; this run draws "
                f"{shape}, {images} of each prompt"
            )

    def before(self, state: State) -> None:
        now = state.clock.timestep
        level = min(range(len(self._times)), key=lambda i: abs(self._times[i] - now))
        every = self.together and level == 0
        held = self.path[max(level, self.earliest + (level > 0)) if self.earliest else level]
        latents = state.latents.clone()
        for row in state.images if every else state.images.where(prompt=0):
            latents[row.index] = held[row.image if len(held) > 1 else 0].to(latents)
        state.latents = latents
