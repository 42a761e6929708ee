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
from hookctl.arguments import checked, number, whole
from hookctl.loop.inversion import (
    Correction,
    Progress,
    ddim_path,
    null_texts,
    require_first_order,
)
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.inversion import Inversion
from hookctl.recipes.common.real_images.inverted import Inverted


class NullTextInversion(Inversion):
    """An image with an unconditional embedding for each step.

        inverted = NullTextInversion(pipe, image, prompt).run(progress=print)

    image, prompt, steps: see `Inversion`. guidance: scale that the embeddings are fitted for, and
    that edits should have. iterations: of Adam, at most, for each step; rate: its learning rate,
    falling to half of it; tolerance: loss that is good enough at the first step (it grows by 1e-3
    over the run, as published for 50 steps). refine: of the DDIM inversion (`DDIMInversion`).

    Cost: a denoiser call for each step of the inversion, and for each step of sampling two and up
    to `iterations` with their backward passes. Raises UnsupportedError for schedulers that are not
    of first order.
    """

    @checked()
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        guidance: float = 7.5,
        iterations: int = 10,
        rate: float = 1e-2,
        tolerance: float = 1e-5,
        refine: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(pipe, image, prompt, guidance=guidance, **options)
        scale = "a scale above 1, since there is no unconditional text without guidance"
        number(guidance, "NullTextInversion: guidance", above=1, wanted=scale)
        self.iterations = whole(iterations, "NullTextInversion: iterations", 1)
        self.rate = number(rate, "NullTextInversion: rate", above=0)
        self.tolerance = number(tolerance, "NullTextInversion: tolerance", low=0)
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
        return self._inverted(program, path, corrections, edit_guidance=self.guidance)
