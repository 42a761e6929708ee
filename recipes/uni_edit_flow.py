"""UniEdit-Flow: an inversion that corrects its own prediction, and edits where two texts differ.

Jiao et al., "UniEdit-Flow: Unleashing Inversion and Editing in the Era of Flow Models", arXiv
2504.13109. Uni-Inv takes a share `alpha` of the steps upwards from the image, s to the noisier s',

    x~ = x + (s' - s) v         v' = v(x~, s')         x' = x + (s' - s) v'

with the last step's velocity as v: one pass of the fixed point that undoes Euler's step exactly.
Uni-Edit takes the same steps down again. From the same latents, with d = v(target) - v(source) and
m the mean of |d| over the channels, scaled to 0..1 over the image,

    v = m v(target) + (1 - m) v(source) + omega (1 + m) d

The authors' code for FLUX does so; theirs for diffusers has d with its sign in m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.arguments import checked, number, one_of, refusal
from hookctl.editor import Editor
from hookctl.loop.inversion import unit_noise
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images import flow
from hookctl.session import control

ABSOLUTE, SIGNED = "absolute", "signed"


class UniEditFlow(flow.FlowProgram):
    """Edit a real image where two prompts differ.

        edit = UniEditFlow(pipe, image, "a photo of a dog", source_prompt="a photo of a cat")
        edited = edit.run()[0]

    image: PIL, mode RGB, or for pipelines of videos a list of frames; prompt: of the edit. Or a
        list of each, of images of one size.
    source_prompt: the image's, one or a list; by default none. The inversion has none.
    steps: of the schedule; alpha: share of them that is taken, above 0, to 1; omega: by how much
        the difference is exaggerated, 0 or more; 0.6 and 5 of 15 as published, 0.8 of 25 for Wan.
    guidance: scale of both texts: of classifier-free guidance, or the one that a model was taught;
        inversion_guidance: likewise upwards. negative: prompt of the unconditional rows.
    mask: "absolute" or "signed", how m is made. zero_init: the first predictor is 0, which saves a
        call. unit_noise: as of `RFSolver`. arguments: further ones of the pipeline's call.
    paper: as the official code, which has NaN for m where the texts agree everywhere, and with
        mask="signed" encodes with the sign of the VAE's shift changed.

    Raises as `FlowEdit` does.
    """

    @checked(own=("arguments",))
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        source_prompt: str | Sequence[str] = "",
        steps: int = 15,
        alpha: float = 0.6,
        omega: float = 5.0,
        guidance: float = 1.0,
        inversion_guidance: float = 1.0,
        negative: str | None = None,
        mask: str = ABSOLUTE,
        zero_init: bool = False,
        unit_noise: bool = False,
        arguments: Mapping[str, Any] | None = None,
        paper: bool = False,
    ) -> None:
        flow.require_flow(pipe, "UniEditFlow")
        number(alpha, "UniEditFlow: alpha", above=0, high=1)
        self.omega = number(omega, "UniEditFlow: omega", low=0)
        self.mask = one_of(mask, "UniEditFlow: mask", (ABSOLUTE, SIGNED))
        floor = paper and mask == SIGNED
        self.taken = int(alpha * steps + 1e-9) if floor else round(alpha * steps)
        if not self.taken:
            enough = f"so much that one of {steps} steps is taken"
            raise refusal("UniEditFlow: alpha", alpha, enough)
        super().__init__(pipe, image, prompt, steps=steps, negative=negative, arguments=arguments)
        self.sources = flow.for_each_image(source_prompt, self.prompts, "UniEditFlow")
        self.guidance, self.inversion_guidance = float(guidance), float(inversion_guidance)
        self.zero_init, self.unit_noise, self.paper = zero_init, unit_noise, paper
        self.masks: list[Tensor] = []  # m of each step of the last run, [images, ...]
        if floor:
            vae = pipe.vae.config
            self.clean = self.clean + (vae.shift_factor or 0.0) * (1 + vae.scaling_factor)

    @checked()
    def run(self, *editors: Editor, output_type: str = "pil") -> Any:
        """Invert and edit; a list of images, or as output_type= has it.

        editors: that act inside the denoiser, on the rows of the sources (the first prompts) and
        of their edits.
        """
        flow.check_editors(editors, self)
        inverted, scales = self.invert(), [self.guidance] * (2 * len(self.prompts))
        with control(self.pipe, *editors) as self.session:
            program = self._program([*self.sources, *self.prompts], scales)
            program.start = self.steps - self.taken
            drawn = self._edited(program, flow.wide(inverted))
            program.latents = drawn.to(program.latents)
            return program.decode(output_type)

    @checked()
    @torch.no_grad()
    def invert(self) -> Tensor:
        """Latents of the images at the level that the edit starts from, [images, ...]."""
        scales = [self.inversion_guidance] * len(self.prompts)
        program = self._program([""] * len(self.prompts), scales)
        x = clean = flow.wide(self.clean.to(program.latents))
        levels = [level.noise for level in program.levels]
        v = torch.zeros_like(x)
        if not self.zero_init:
            v = self._velocity(program, scales, x, self.steps)
        for i in reversed(range(self.steps - self.taken, self.steps)):
            length = levels[i] - levels[i + 1]
            v = self._velocity(program, scales, x + length * v, i)
            x = x + length * v
        if self.unit_noise:
            x = unit_noise(x, clean, program.levels[self.steps - self.taken])
        return x.to(program.latents)

    @torch.no_grad()
    def _edited(self, program: Trajectory, x: Tensor) -> Tensor:
        levels, scales = [level.noise for level in program.levels], [self.guidance] * (2 * len(x))
        self.masks.clear()
        for i in range(program.start, self.steps):
            both = self._velocity(program, scales, torch.cat([x, x]), i)
            source, target = both[: len(x)], both[len(x) :]
            difference = target - source
            m = self._mask(difference)
            v = m * target + (1 - m) * source + self.omega * (1 + m) * difference
            x = x + (levels[i + 1] - levels[i]) * v
            self.masks.append(program.unpacked(m.expand_as(x))[:, 0].cpu())
        return x

    def _mask(self, difference: Tensor) -> Tensor:
        """m, [images, ...] with one channel: the last of packed latents, else the first."""
        channels = -1 if difference.dim() == 3 else 1
        m = (difference.abs() if self.mask == ABSOLUTE else difference).mean(channels, keepdim=True)
        low, high = (edge(tuple(range(1, m.dim())), keepdim=True) for edge in (m.amin, m.amax))
        if self.paper:
            return (m - low) / (high - low + (0.0 if self.mask == ABSOLUTE else 1e-7))
        return (m - low) / (high - low).clamp_min(torch.finfo(m.dtype).tiny)
