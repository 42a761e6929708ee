"""Edit-friendly DDPM inversion: noise maps that carry the image through a random sampler.

Huberman-Spiegelglas, Kulikov and Michaeli, "An Edit Friendly DDPM Noise Space: Inversion and
Manipulations", arXiv 2304.06140 (CVPR 2024). The image is diffused to every level by noise drawn
independently for each, and the sampler's noise is what leads from one to the next:

    x_i = a_i x_0 + s_i xi_i,     z_i = (x_{i+1} - mu(x_i)) / sigma_i

Drawing with the z_i gives the image back; with other prompts, its edits. The z_i of different
steps are correlated, so they hold the image's structure better than the sampler's native noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hookctl.address.clock import Window
from hookctl.arguments import checked, number, refusal
from hookctl.loop.inversion import Progress, edit_friendly_noise
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.inversion import Inversion
from hookctl.recipes.common.real_images.inverted import Inverted


class EditFriendlyDDPM(Inversion):
    """An image as the noise of every step, from a level short of the noisiest.

        inverted = EditFriendlyDDPM(pipe, image, prompt, seed=0).run()
        again, edited = inverted.edit(pipe, prompts=[prompt, target])   # guidance 15
        again, edited = inverted.edit(pipe, PromptToPrompt([prompt, target]), guidance=9)

    image, prompt, steps: see `Inversion`. guidance: scale for the source's rows.
    skip: fraction of the schedule left out at the noisy end; the smaller, the freer the edits
        (published: 36 of 100 steps, 12 with Prompt-to-Prompt).
    eta: share of fresh noise, above 0. seed: of the noise.
    paper: leave out what the last step misses, as the official code does; by default it is added to
        the source again.

    Cost: a denoiser call of two rows for each step that isn't skipped. Takes schedulers whose steps
    accept noise (DDIMScheduler; DPMSolverMultistepScheduler with algorithm_type="sde-dpmsolver++",
    as in LEDITS++); raises UnsupportedError for others.
    """

    edit_guidance = 15.0

    @checked()
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        steps: int = 100,
        guidance: float = 3.5,
        skip: float = 0.36,
        eta: float = 1.0,
        seed: int = 0,
        paper: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(pipe, image, prompt, steps=steps, guidance=guidance, arguments=arguments)
        self.skip = Window.of((skip, 1.0), "EditFriendlyDDPM: skip").start
        if int(self.skip * self.steps) >= self.steps:
            raise refusal(
                "EditFriendlyDDPM: skip", skip, f"a smaller one, which leaves some of {steps} steps"
            )
        self.eta = number(eta, "EditFriendlyDDPM: eta", above=0, high=1)
        self.seed, self.paper = seed, paper

    def _invert(self, program: Trajectory, progress: Progress | None) -> Inverted:
        start = int(self.skip * program.steps + 1e-9)
        path, corrections = edit_friendly_noise(
            program,
            self.clean,
            guidance=self.guidance,
            generator=torch.Generator().manual_seed(self.seed),
            start=start,
            eta=self.eta,
            exact=not self.paper,
            progress=progress,
        )
        return self._inverted(program, path, corrections, start=start, eta=self.eta)
