"""Negative-prompt inversion: the source's prompt in place of the unconditional one.

Miyake et al., "Negative-prompt Inversion: Fast Image Inversion for Editing with Text-guided
Diffusion Models", arXiv 2305.16807. The embedding that null-text optimisation seeks is near the
prompt's own; put in its place outright, the source's guidance becomes

    eps = eps(c_s) + s (eps(c_s) - eps(c_s)) = eps(c_s)

so that its row is drawn as if unguided, on the inverted path, and edits are guided away from the
source's prompt. Nothing is optimised. With `proximal` the guidance of the edits is limited to where
it is strong (`ProximalGuidance`; Han et al., arXiv 2306.05414).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hookctl.arguments import checked
from hookctl.loop.inversion import Progress, ddim_path, require_first_order
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.inversion import Inversion
from hookctl.recipes.common.real_images.inverted import Inverted
from hookctl.recipes.proximal_guidance import ProximalGuidance


class NegativePromptInversion(Inversion):
    """An image whose own prompt is its edits' negative prompt.

        inverted = NegativePromptInversion(pipe, image, prompt, proximal=0.7).run()

    image, prompt, steps: see `Inversion`. guidance: scale for the edits. proximal: quantile of
    `ProximalGuidance`, None for none; for its further options give the editor to `edit` yourself.
    refine: of the DDIM inversion (`DDIMInversion`).

    Cost: a denoiser call of one row for each step. Raises UnsupportedError for schedulers that are
    not of first order.
    """

    @checked()
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        proximal: float | None = None,
        refine: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(pipe, image, prompt, **options)
        self.limits = () if proximal is None else (ProximalGuidance(proximal),)
        self.refine = refine

    @checked()
    def run(self, progress: Progress | None = None) -> Any:
        inverted = super().run(progress)
        images = [inverted] if self.single else inverted
        images = [replace(image, negative=image.prompt) for image in images]
        return images[0] if self.single else images

    def _invert(self, program: Trajectory, progress: Progress | None) -> Inverted:
        require_first_order(program, type(self).__name__)
        path = ddim_path(program, self.clean, refine=self.refine, progress=progress)
        return self._inverted(program, path, edit_guidance=self.guidance, editors=self.limits)
