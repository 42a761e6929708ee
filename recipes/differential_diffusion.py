"""Differential Diffusion: every pixel of an image changes as much as a map says.

Levin and Fried, "Differential Diffusion: Giving Each Pixel Its Strength", arXiv 2306.00950
(Eurographics 2025). The image is noised to the level of every step by one noise. A place joins the
denoising as its share of the steps begins, and until then is set to the image's own level:

    x_i <- where(1 - change > i / N, level_i(image, noise), x_i)        before step i of N

The official code starts from the image's first level everywhere and leaves the last step alone;
here a place that may change wholly starts from noise as ever, and one that may not change at all is
the image's in the end. diffusers' port for Flux compares with i / N after step i, so that all is
let go one step later than that; ComfyUI's counts by timesteps in the place of steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hookctl.address.per_prompt import is_box
from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.arguments import checked, is_list, one_of, opened, share
from hookctl.editor import LATENTS, Claim, Editor
from hookctl.errors import InputError
from hookctl.loop.noise import Noise, noise_like
from hookctl.loop.state import State
from hookctl.recipes.common.latent_masks import cells_inside, shape_of_latents
from hookctl.recipes.common.real_images.encoded import encoded, takes_videos
from hookctl.run_state import RunState

STEP, TIMESTEP = "step", "timestep"


class DifferentialDiffusion(Editor):
    """Draw an image anew, each place as much as a map says.

        edit = DifferentialDiffusion(image, change=change_map)       # bright: may change
        with hookctl.control(pipe, edit):
            images = pipe("a painting of a fox", ...).images

    image: PIL in mode RGB, or the path of one, of the size that is drawn; for pipelines of videos
        a list of frames. For every prompt, or a list with one for each.
    change: how much each place may change, from 0 (black: the image's) to 1 (white: drawn anew): a
        grey image, [height, width] from 0 to 1, or anything that is a region, which is 1 inside; or
        a list with one for each prompt. Official maps say how much is kept: give `1 - map`.
    strength: as of image-to-image, 0 to 1: all is the image's until this share of the steps is
        left, and shares of the map are of those.
    by: what a share of the schedule is counted in, "step" (published) or "timestep" (ComfyUI's),
        for models that spend most of their steps in noise.
    seed: of the noise on the image, for every image of the run its own; by default it is that which
        the run itself starts from. Pipelines that start from an image of their own need one.
    paper: all starts from the image's first level, and nothing is set after the last step.

    A map that is 1 everywhere changes nothing, bit for bit. Costs nothing. Raises InputError for
    an image of another size than what is drawn.
    """

    _clean: RunState[Tensor] = RunState()  # [1 | prompts, ...]
    _kept: RunState[Tensor] = RunState()  # 1 - change, in the same form
    _noise: RunState[Tensor | None] = RunState(None)  # [images, ...]

    @checked(own=("change",))
    def __init__(
        self,
        image: Any,
        change: RegionLike | Sequence[RegionLike],
        *,
        strength: float = 1.0,
        by: str = STEP,
        seed: int | None = None,
        paper: bool = False,
    ) -> None:
        several = is_list(change) and not is_box(change)
        given: list[Any] = [*cast(Sequence[Any], change)] if several else [change]
        if not given:
            raise InputError(f"{self.name}: change=[]; give a map, or one for each prompt")
        self.changes: list[Region] = [
            region_of(one, f"{self.name}: change" + (f"[{i}]" if several else ""))
            for i, one in enumerate(given)
        ]
        self.image = image if is_list(image) else opened(image, f"{self.name}: image")
        self.strength = share(strength, f"{self.name}: strength")
        self.by = one_of(by, f"{self.name}: by", (STEP, TIMESTEP))
        self.seed, self.paper = seed, paper

    def neutral(self) -> bool:
        everything = all(float(one.coverage(8, 8).min()) >= 1 for one in self.changes)
        return everything and self.strength == 1 and not self.paper

    def claims(self) -> Sequence[Claim]:
        cure = "Give one of them alone: join their maps, or give a list with one for each prompt"
        return [Claim(LATENTS, cure=cure)]

    def attach(self, target: Any) -> None:
        if not hasattr(target, "scheduler"):
            raise InputError(f"{self.name} needs the pipeline; control that, not its denoiser")
        Noise(target.scheduler)
        if self.seed is None and "strength" in inspect.signature(type(target).__call__).parameters:
            raise InputError(
                f"{self.name}: {type(target).__name__} starts from an image, so which noise is on "
                "it is not known; give seed=, or use the pipeline that draws from a text alone"
            )
        given = self.image if is_list(self.image) else [self.image]
        if takes_videos(target) and not any(is_list(one) for one in given):
            given = [given]  # the frames of one video
        flat = [frame for one in given for frame in (one if is_list(one) else [one])]
        if not flat:
            raise InputError(f"{self.name}: image={self.image}; give an image, or a list of them")
        for frame in flat:
            opened(frame, f"{self.name}: image")
        self._clean = encoded(target, given, self.name).latents

    def begin(self, state: State) -> None:
        drawn = 1 + max(row.prompt for row in state.rows)
        for name, count in (("image", len(self._clean)), ("change", len(self.changes))):
            if count not in (1, drawn):
                raise InputError(
                    f"{self.name}: {name} is for {count} prompts, but the pipeline draws {drawn}; "
                    "give one for all, or one for each"
                )
        size, wanted = tuple(self._clean.shape[1:]), shape_of_latents(state)
        if size != wanted:
            raise InputError(
                f"{self.name}: the image's latents are {size}, and this run draws {wanted}; give "
                "an image of the size that is drawn"
            )
        changes = [cells_inside(one, state) for one in self.changes]
        self._kept, self._noise = 1 - torch.stack(changes), None

    def before(self, state: State) -> None:
        if state.clock.step:
            return
        x = state.latents
        if x.shape[1:] != self._clean.shape[1:]:
            return  # reference images stand behind, where the first level is noise alone
        self._noise = self._of_run(x, state)
        level = Noise(state.pipe.scheduler).level(self._time(state, 0))
        if level.signal:
            self._set(state, self._keeping(state, 0), level.mix(self._image(x, state), self._noise))

    def after(self, state: State) -> None:
        clock, x = state.clock, state.latents
        if self._noise is None:
            assert state.noisy is not None  # a step was taken
            self._noise = self._of_run(state.noisy, state)
        image, keep = self._image(x, state), self._keeping(state, clock.step + 1)
        if clock.step + 1 < clock.steps:
            level = Noise(state.pipe.scheduler).level(self._time(state, clock.step + 1))
            image = level.mix(image, self._noise.to(x))
        self._set(state, keep, image)

    @staticmethod
    def _set(state: State, keep: Tensor, image: Tensor) -> None:
        if bool(keep.any()):
            state.latents = torch.where(keep.to(image.device), image, state.latents)

    def _keeping(self, state: State, step: int) -> Tensor:
        """Which places are the image's at the beginning of a step, in `_kept`'s form."""
        steps, kept = state.clock.steps, self._of_images(self._kept, state)
        first = steps - int(self.strength * steps + 1e-9)
        if step == steps:  # the end
            return kept >= (2 if self.paper else 0 if first == steps else 1)
        if step < first or (step == first and (first or self.paper)):
            return torch.ones_like(kept, dtype=torch.bool)
        passed = (step - first) / (steps - first)
        if self.by == TIMESTEP:
            passed = 1 - self._time(state, step) / self._time(state, first)
        return kept > passed

    def _image(self, x: Tensor, state: State) -> Tensor:
        return self._of_images(self._clean, state).to(x)

    def _of_run(self, x: Tensor, state: State) -> Tensor:
        """The noise of every image, out of the latents that a run starts from."""
        if self.seed is not None:
            return noise_like(x, torch.Generator().manual_seed(self.seed))
        return x / float(getattr(state.pipe.scheduler, "init_noise_sigma", 1.0))

    def _of_images(self, one_for_each: Tensor, state: State) -> Tensor:
        """Of [1 | prompts, ...] what each image of the run has."""
        if len(one_for_each) == 1:
            return one_for_each
        return one_for_each[[row.prompt for row in state.images]]

    @staticmethod
    def _time(state: State, step: int) -> float:
        """The timestep of a step of the run."""
        return float(state.pipe.scheduler.timesteps[state.clock.skipped + step])
