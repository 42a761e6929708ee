"""Negative-prompt inversion: the source's prompt in place of the unconditional one.

Miyake et al., "Negative-prompt Inversion: Fast Image Inversion for Editing with Text-guided
Diffusion Models", arXiv 2305.16807. The embedding that null-text optimisation seeks is near the
prompt's own; put in its place outright, the source's guidance becomes

    eps = eps(c_s) + s (eps(c_s) - eps(c_s)) = eps(c_s)

so that its row is drawn as if unguided, on the inverted path, and edits are guided away from the
source's prompt. Nothing is optimised. Towards the empty text on the great circle through both,

    e = sin((1 - a) w) / sin(w) e_s + sin(a w) / sin(w) e_empty,     w the angle between them

(`npi_interp`, ProxEdit's) edits are freer and the source is drawn less well. With `proximal` the
guidance of the edits is limited to where it is strong (`ProximalGuidance`; Han et al., arXiv
2306.05414).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hookctl.address.rows import COND, UNCOND
from hookctl.arguments import checked, share
from hookctl.errors import UnsupportedError
from hookctl.loop import prompts
from hookctl.loop.inversion import Correction, Progress, ddim_path, require_first_order
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.inversion import Inversion
from hookctl.recipes.common.real_images.inverted import Inverted
from hookctl.recipes.proximal_guidance import ProximalGuidance


class NegativePromptInversion(Inversion):
    """An image whose own prompt is its edits' negative prompt.

        inverted = NegativePromptInversion(pipe, image, prompt, proximal=0.7).run()

    image, prompt, steps: see `Inversion`. guidance: scale for the edits. proximal: quantile of
    `ProximalGuidance`, None for none; for its further options give the editor to `edit` yourself.
    npi_interp: a, 0 for the prompt alone and 1 for the empty text. interp_source: whether the
    source's own unconditional rows get that text too, as in ProxEdit with Prompt-to-Prompt; with
    MasaCtrl they keep the prompt's there. refine: of the DDIM inversion (`DDIMInversion`).

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
        npi_interp: float = 0.0,
        interp_source: bool = True,
        refine: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(pipe, image, prompt, **options)
        self.limits = () if proximal is None else (ProximalGuidance(proximal),)
        self.npi_interp = share(npi_interp, "NegativePromptInversion: npi_interp")
        self.interp_source, self.refine = interp_source, refine

    @checked()
    def run(self, progress: Progress | None = None) -> Any:
        inverted = super().run(progress)
        images = [inverted] if self.single else inverted
        if self._takes_negative:
            images = [replace(image, negative=image.prompt) for image in images]
        return images[0] if self.single else images

    @property
    def _takes_negative(self) -> bool:
        """Whether the pipeline takes negative prompts; FLUX.2 klein has the empty one alone."""
        return "negative_prompt" in inspect.signature(type(self.pipe).__call__).parameters

    def _invert(self, program: Trajectory, progress: Progress | None) -> Inverted:
        require_first_order(program, type(self).__name__)
        path = ddim_path(program, self.clean, refine=self.refine, progress=progress)
        fields: dict[str, Any] = {"edit_guidance": self.guidance, "editors": self.limits}
        own = program.template.text(COND)
        if not self._takes_negative:
            fields["corrections"] = [Correction({UNCOND: own})] * program.steps
        if self.npi_interp:
            empty = prompts.encode(self.pipe, [""], program.template.encoding).sequence
            if empty.shape[1:] != own.shape[1:]:
                raise UnsupportedError(
                    f"npi_interp={self.npi_interp}: the prompt has {own.shape[1]} tokens and the "
                    f"empty text {empty.shape[1]}, with nothing between; give npi_interp=0"
                )
            between = great_circle(own, empty.to(own).expand_as(own), self.npi_interp)
            fields["corrections"] = [Correction({UNCOND: between})] * program.steps
            if not self.interp_source:
                fields["source_contexts"] = {UNCOND: own}
        return self._inverted(program, path, **fields)


def great_circle(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Between texts [prompts, tokens, channels], each as one vector; 0 is a, 1 is b."""
    x, y = a.flatten(1), b.flatten(1)
    cosine = (x / x.norm(dim=1, keepdim=True) * (y / y.norm(dim=1, keepdim=True))).sum(1)
    angle = torch.acos(cosine.clamp(-1, 1))[:, None]
    whole = torch.sin(angle)
    mixed = torch.sin((1 - part) * angle) / whole * x + torch.sin(part * angle) / whole * y
    # Of one and the same text there is nothing between.
    return torch.where(whole > 0, mixed, torch.lerp(x, y, part)).reshape(a.shape)
