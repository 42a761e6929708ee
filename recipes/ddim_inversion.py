"""DDIM inversion: the deterministic sampler run backwards from a real image.

Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, section 4.3; Dhariwal and
Nichol, arXiv 2105.05233, appendix F. With the step x' = a' x0(x) + s' eps(x), a level's latents are
sought of which only the next level's are known:

    x_i = a_i x0 + s_i eps,   (x0, eps) from the prediction at (x_{i+1}, t_i)

which is exact in the limit of many steps. Refined, the prediction is made again at the x_i just
found; the fixed point of this is the exact inverse (Pan et al., "Effective Real Image Editing with
Accelerated Iterative Diffusion Inversion", arXiv 2309.04907).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookctl.arguments import checked, one_of
from hookctl.errors import InputError
from hookctl.loop.inversion import Progress, ddim_path, require_first_order
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.inversion import Inversion
from hookctl.recipes.common.real_images.inverted import Inverted


class DDIMInversion(Inversion):
    """The path of a real image under the deterministic sampler.

        inverted = DDIMInversion(pipe, image, prompt, refine=5).run()
        again, edited = inverted.edit(pipe, prompts=[prompt, target])

    image, prompt, steps: see `Inversion`.
    guidance: scale of the inversion, and of the source when it is drawn again. The official code
        draws the source with the scale of its edits, which leaves the path; for that give
        `edit(source_guidance=7.5)`.
    refine: how often the prediction is made again at every step, 0 as published.
    timestep: "target" predicts at the timestep of the level sought, as all published code does;
        "source" at that of the latents known.

    Cost: a denoiser call of one row for each step and each refinement of it (of two rows with
    guidance). Raises UnsupportedError for schedulers that are not of first order.
    """

    @checked()
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        guidance: float = 1.0,
        refine: int = 0,
        timestep: str = "target",
        **options: Any,
    ) -> None:
        super().__init__(pipe, image, prompt, guidance=guidance, **options)
        self.refine = refine
        self.timestep = one_of(timestep, f"{type(self).__name__}: timestep", ("target", "source"))
        if refine and timestep == "source":
            raise InputError("DDIMInversion: refine is for timestep='target'; give refine=0")

    def _invert(self, program: Trajectory, progress: Progress | None) -> Inverted:
        require_first_order(program, type(self).__name__)
        path = ddim_path(
            program,
            self.clean,
            guidance=self.guidance,
            refine=self.refine,
            timestep=self.timestep,
            progress=progress,
        )
        return self._inverted(program, path)
