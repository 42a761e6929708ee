"""Given images at the noise level of any step of a run, by one noise for all of them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hookctl.arguments import is_list, opened
from hookctl.errors import InputError
from hookctl.loop.noise import Noise, noise_like
from hookctl.loop.state import State
from hookctl.recipes.common.real_images.encoded import encoded, takes_videos
from hookctl.run_state import RunState


class ImageLevels:
    """Images as a run would have them at its steps.

    who: the editor, for errors. image: PIL or a path, for pipelines of videos a list of frames; or
    a list with one for each prompt. seed: of the noise, for every image of the run its own; None
    for the one that the run starts from.
    """

    _clean: RunState[Tensor] = RunState()  # [1 | prompts, ...]
    _noise: RunState[Tensor | None] = RunState(None)  # [images, ...]

    def __init__(self, who: str, image: Any, seed: int | None) -> None:
        self.who, self.seed = who, seed
        self.image = image if is_list(image) else opened(image, f"{who}: image")

    def attach(self, target: Any) -> None:
        """Encode the images. Raises InputError for those that are none, for a bare denoiser, and
        where the run's own noise is not known."""
        if not hasattr(target, "scheduler"):
            raise InputError(f"{self.who} needs the pipeline; control that, not its denoiser")
        Noise(target.scheduler)
        if self.seed is None and "strength" in inspect.signature(type(target).__call__).parameters:
            raise InputError(
                f"{self.who}: {type(target).__name__} starts from an image, so which noise is on "
                "it is not known; give seed=, or use the pipeline that draws from a text alone"
            )
        given = self.image if is_list(self.image) else [self.image]
        if takes_videos(target) and not any(is_list(one) for one in given):
            given = [given]  # the frames of one video
        flat = [frame for one in given for frame in (one if is_list(one) else [one])]
        if not flat:
            raise InputError(f"{self.who}: image={self.image}; give an image, or a list of them")
        for frame in flat:
            opened(frame, f"{self.who}: image")
        self._clean = encoded(target, given, self.who).latents

    def begin(self, state: State) -> None:
        """Check the run: raises InputError for another number of prompts, or another size."""
        check_each(self.who, "image", len(self._clean), state)
        size, wanted = tuple(self._clean.shape[1:]), tuple(state.latents.shape[1:])
        if size != wanted:
            raise InputError(
                f"{self.who}: the image's latents are {size}, and this run draws {wanted}; give "
                "an image of the size that is drawn"
            )
        self._noise = None

    def start(self, x: Tensor, state: State) -> None:
        """The noise of every image; x: the latents that the run starts from, [images, ...]."""
        if self.seed is not None:
            self._noise = noise_like(x, torch.Generator().manual_seed(self.seed))
        else:
            self._noise = x / float(getattr(state.pipe.scheduler, "init_noise_sigma", 1.0))

    def at(self, state: State, step: int) -> Tensor | None:
        """The images before a step, or clean behind the last, [images, ...]; None where they would
        be noise alone."""
        clean = of_images(self._clean, state).to(state.latents)
        if step == state.clock.steps:
            return clean
        if self._noise is None:  # a program's calls may begin later than its steps
            assert state.noisy is not None  # a step was taken
            self.start(state.noisy, state)
        assert self._noise is not None
        level = Noise(state.pipe.scheduler).level(time_of(state, step))
        return level.mix(clean, self._noise.to(clean)) if level.signal else None


def check_each(who: str, what: str, count: int, state: State) -> None:
    """Raise InputError unless there is one for all prompts of a run, or one for each."""
    drawn = 1 + max(row.prompt for row in state.rows)
    if count not in (1, drawn):
        raise InputError(
            f"{who}: {what} is for {count} prompts, but the pipeline draws {drawn}; give one for "
            "all, or one for each"
        )


def of_images(one_for_each: Tensor, state: State) -> Tensor:
    """Of [1 | prompts, ...] what each image of a run has."""
    if len(one_for_each) == 1:
        return one_for_each
    return one_for_each[[row.prompt for row in state.images]]


def time_of(state: State, step: int) -> float:
    """The scheduler's timestep of a step of the run."""
    return float(state.pipe.scheduler.timesteps[state.clock.skipped + step])
