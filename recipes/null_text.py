"""Null-text inversion: fit the unconditional text so that guided sampling follows the image.

Mokady et al., "Null-text Inversion for Editing Real Images using Guided Diffusion Models",
arXiv 2211.09794 (CVPR 2023). DDIM inversion without guidance gives a pivot x*; then, step by step
from the noisiest,

    null_i = argmin || x*_{i+1} - step(x_i, null) ||^2,     x_{i+1} = step(x_i, null_i)

by Adam on the embedding, started from the last step's. Drawing uses null_i in the unconditional
rows of the source and of its edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookctl.address.rows import UNCOND
from hookctl.errors import InputError
from hookctl.loop.inversion import (
    Correction,
    Progress,
    ddim_path,
    null_texts,
    require_first_order,
)
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.inversion import Inversion, Inverted


class NullTextInversion(Inversion):
    """An image with an unconditional embedding for each step.

        inverted = NullTextInversion(pipe, image, prompt).run(progress=print)

    guidance: scale that the embeddings are fitted for, and that edits should have. iterations:
    at most, for each step; rate: Adam's, falling to half of it; tolerance: loss that is good enough
    at the first step (it grows by 1e-3 over the run, as published for 50 steps). refine: of the
    DDIM inversion. Cost: a denoiser call for each step of the inversion, and for each of sampling
    two and up to `iterations` with their backward passes.
    """

    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        steps: int = 50,
        guidance: float = 7.5,
        iterations: int = 10,
        rate: float = 1e-2,
        tolerance: float = 1e-5,
        refine: int = 0,
    ) -> None:
        super().__init__(pipe, image, prompt, steps=steps, guidance=guidance)
        if guidance <= 1:
            raise InputError(f"guidance={guidance!r} has no unconditional text; give one above 1")
        if iterations < 1 or rate <= 0:
            raise InputError(f"iterations={iterations!r}, rate={rate!r}; give numbers above 0")
        self.iterations, self.rate, self.tolerance = iterations, rate, tolerance
        self.refine = refine

    def _invert(self, program: Trajectory, progress: Progress | None) -> Inverted:
        require_first_order(program, type(self).__name__)
        path = ddim_path(program, self.clean, refine=self.refine)
        texts = null_texts(
            program,
            path,
            guidance=self.guidance,
            iterations=self.iterations,
            rate=self.rate,
            tolerance=self.tolerance,
            progress=progress,
        )
        corrections = [Correction({UNCOND: text}) for text in texts]
        return self._found(program, path, corrections, edit_guidance=self.guidance)
