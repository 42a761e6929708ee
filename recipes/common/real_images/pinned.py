"""The source kept on a path of latents, such as that of an inverted image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hookctl.address.rows import Row
from hookctl.arguments import is_list
from hookctl.errors import InputError
from hookctl.loop.noise import Noise
from hookctl.loop.state import State
from hookctl.run_state import RunState

Path = Tensor | Sequence[Tensor]


class Pinned:
    """Before every step the latents of prompt 0 are set to those of a path.

    who: the recipe, for errors. path: latents at the level of each timestep, noisiest first
    (`loop.inversion`), one image's, [channels, ...], or one for each image of a prompt,
    [1 | images, channels, ...]; further levels (the clean image) are not used. shared_start: the
    other prompts start from the same noise. first_level: the level of the first step, so that the
    source is cleaner than what is drawn; later steps take no level before the next one.

    Raises InputError for a path that holds no latents.
    """

    _levels: RunState[Tensor] = RunState()  # [levels, 1 | images, channels, ...]
    _times: RunState[list[float]] = RunState()

    def __init__(
        self, who: str, path: Path, *, shared_start: bool = False, first_level: int = 0
    ) -> None:
        levels = list(path) if isinstance(path, Tensor) and path.dim() or is_list(path) else []
        if not levels or any(not isinstance(x, Tensor) or x.dim() < 2 for x in levels):
            raise InputError(f"{who}: path holds no latents; give one tensor for each level")
        if len({x.shape for x in levels}) > 1:
            raise InputError(f"{who}: path has levels of several shapes; give tensors of one shape")
        self.path, self.who = torch.stack(levels), who
        self.shared_start, self.first_level = shared_start, first_level

    def begin(self, state: State) -> None:
        """Check the path against the run; InputError for other levels or another shape."""
        shape = tuple(state.latents.shape[1:])
        alone = tuple(self.path.shape[1:]) == shape
        path = self._levels = self.path[:, None] if alone else self.path
        self._times = Noise(state.pipe.scheduler).timesteps
        steps = len(self._times)
        least = max(steps, self.first_level + 2 if self.first_level else 0)
        if len(path) < least:
            raise InputError(
                f"{self.who}: path has {len(path)} levels and this run {steps} timesteps; "
                f"invert with as many steps, so that there are {least} levels or more"
            )
        images = 1 + max(row.image for row in state.images)
        if tuple(path.shape[2:]) != shape or path.shape[1] not in (1, images):
            raise InputError(
                f"{self.who}: path is of latents {tuple(path.shape[1:])}; this run draws "
                f"{shape}, {images} of each prompt"
            )

    def before(self, state: State) -> None:
        now = state.clock.timestep
        level = min(range(len(self._times)), key=lambda i: abs(self._times[i] - now))
        every_image = self.shared_start and level == 0
        rows = state.images if every_image else state.images.where(prompt=0)
        if self.first_level:
            level = max(level, self.first_level + (level > 0))
        self.set(state, level, rows)

    def set(self, state: State, level: int, rows: Iterable[Row] | None = None) -> None:
        """Set the latents of these rows, by default of prompt 0, to those of a level."""
        latents, path = state.latents.clone(), self._levels[level]
        for row in state.images.where(prompt=0) if rows is None else rows:
            latents[row.index] = path[row.image if len(path) > 1 else 0].to(latents)
        state.latents = latents
