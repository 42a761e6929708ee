"""Direct inversion: keep the source on its inverted path by adding what each step misses.

Ju et al., "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code",
arXiv 2310.01506 (ICLR 2024). After DDIM inversion to x*, the source's latents get, right after
each guided step and before any blending, the offset

    o_i = x*_{i+1} - step(x*_i)

so that the source follows x* whatever the guidance, and its edits read the attention of the true
image. Nothing is optimised; the edits themselves get no offset. The official code records o_i in
a pass of its own; but x*_i + o_i is x*_{i+1}, so the source is simply set to it, which costs
nothing and lets no rounding add up.

Since the source is led in any case, x* need not be where the sampler goes by itself. With
`unit_noise`, no part of the paper, its noise gets the mean and variance of the noise that the model
knows, so that the edits, which nobody leads, start where the model draws well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookctl.arguments import checked
from hookctl.loop.inversion import (
    Correction,
    Progress,
    ddim_path,
    require_deterministic,
    with_unit_noise,
)
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.inversion import Inversion
from hookctl.recipes.common.real_images.inverted import Inverted


class DirectInversion(Inversion):
    """An image whose row is led back to it at every step.

        inverted = DirectInversion(pipe, image, prompt).run()
        again, edited = inverted.edit(pipe, PromptToPrompt([prompt, target]))

    image, prompt, steps: see `Inversion`. guidance: scale for the source's rows, and for its edits
    unless `edit` is given another. refine: of the DDIM inversion (`DDIMInversion`), 0 as published.
    unit_noise: bring the path's noise to mean 0 and variance 1 (see above).

    Cost: a denoiser call of one row for each step. Raises UnsupportedError for schedulers whose
    steps draw noise.
    """

    @checked()
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        refine: int = 0,
        unit_noise: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(pipe, image, prompt, **options)
        self.refine, self.unit_noise = refine, unit_noise

    def _invert(self, program: Trajectory, progress: Progress | None) -> Inverted:
        require_deterministic(program, type(self).__name__)
        path = ddim_path(program, self.clean, refine=self.refine, progress=progress)
        if self.unit_noise:
            path = with_unit_noise(path, program.levels)
        corrections = [Correction(target=x) for x in path[1:]]
        return self._inverted(program, path, corrections, edit_guidance=self.guidance)
