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

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hookctl.address.per_prompt import is_box
from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.arguments import checked, is_list, one_of, share
from hookctl.editor import LATENTS, Claim, Editor
from hookctl.errors import InputError
from hookctl.loop.state import State
from hookctl.recipes.common.latent_masks import cells_inside
from hookctl.recipes.common.real_images.levels import ImageLevels, check_each, of_images, time_of
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

    _kept: RunState[Tensor] = RunState()  # 1 - change, [1 | prompts, ...] as the latents

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
        self.levels = ImageLevels(self.name, image, seed)
        self.strength = share(strength, f"{self.name}: strength")
        self.by = one_of(by, f"{self.name}: by", (STEP, TIMESTEP))
        self.paper = paper

    def neutral(self) -> bool:
        everything = all(float(one.coverage(8, 8).min()) >= 1 for one in self.changes)
        return everything and self.strength == 1 and not self.paper

    def claims(self) -> Sequence[Claim]:
        cure = "Give one of them alone: join their maps, or give a list with one for each prompt"
        return [Claim(LATENTS, cure=cure)]

    def attach(self, target: Any) -> None:
        self.levels.attach(target)

    def begin(self, state: State) -> None:
        check_each(self.name, "change", len(self.changes), state)
        self.levels.begin(state)
        self._kept = 1 - torch.stack([cells_inside(one, state) for one in self.changes])

    def before(self, state: State) -> None:
        if state.clock.step == 0:
            self.levels.start(state.latents, state)
            self._set(state, 0)

    def after(self, state: State) -> None:
        self._set(state, state.clock.step + 1)

    def _set(self, state: State, step: int) -> None:
        """Set the places that are the image's before a step to its level there."""
        keep, image = self._keeping(state, step), self.levels.at(state, step)
        if image is not None and bool(keep.any()):
            state.latents = torch.where(keep.to(image.device), image, state.latents)

    def _keeping(self, state: State, step: int) -> Tensor:
        """Which places are the image's at the beginning of a step, in `_kept`'s form."""
        steps, kept = state.clock.steps, of_images(self._kept, state)
        first = steps - int(self.strength * steps + 1e-9)
        if step == steps:  # the end
            return kept >= (2 if self.paper else 0 if first == steps else 1)
        if step < first or (step == first and (first or self.paper)):
            return torch.ones_like(kept, dtype=torch.bool)
        passed = (step - first) / (steps - first)
        if self.by == TIMESTEP:
            passed = 1 - time_of(state, step) / time_of(state, first)
        return kept > passed
