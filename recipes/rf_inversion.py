"""RF-Inversion: a real image inverted by a flow pulled to noise, and edited by one pulled to it.

Rout et al., "Semantic Image Inversion and Editing using Rectified Stochastic Differential
Equations", arXiv 2410.10792 (ICLR 2025). With y the image's latents, y1 fixed noise, s the level
(1 is noise) and v the model's velocity, upwards from y without a text

    u = v + gamma ((y1 - Y) / (1 - s) - v)         Y' = Y + (s' - s) u

and down again under the edit's text, in a window of the schedule,

    w = v + eta ((X - y) / s - v)                  X' = X + (s' - s) w

Both pulls are those of optimal control: gamma = 1 leads straight to y1, eta = 1 straight to y. The
official code inverts at times that are not those of its latents: it tells the model i / (N + 1) at
step i, and takes the steps in the order of sampling. `times="published"` does so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.arguments import checked, number, one_of, share
from hookctl.editor import Editor
from hookctl.errors import InputError
from hookctl.loop.noise import noise_like
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images import flow
from hookctl.session import control

LEVEL, PUBLISHED = "level", "published"


class RFInversion(flow.FlowProgram):
    """Draw an edit of a real image from its own noise.

        edited = RFInversion(pipe, image, "a photo of a dog", eta=0.9).run()[0]

    image: PIL, mode RGB, or for pipelines of videos a list of frames; prompt: of the edit. Or a
        list of each, of images of one size; all have the same y1.
    source_prompt: of the inversion, by default none. steps: up and down each. guidance: scale of
        the edit: of classifier-free guidance, or the one that a model was taught; 1 for distilled
        ones. inversion_guidance: likewise upwards, by default 1 (0 with `paper`). negative: prompt
        of the unconditional rows.
    gamma: share of the pull to the noise, 0 to 1; eta: of that to the image, 0 to 1; start, stop:
        fractions of the schedule between which eta acts; decay: power by which it falls,
        eta (1 - i / N)^decay, 1 is linearly, 0 not at all.
    times: what the model is told in the inversion, "level" or "published" (see above).
    seed: of y1. arguments: further ones of the pipeline's call. paper: as the official code, with
        published times, and latents drawn from the encoder's distribution.

    Raises InputError for arguments out of bounds, UnsupportedError for other models than those of
    flow matching, and for schedulers that are not of first order.
    """

    @checked(own=("arguments",))
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        source_prompt: str = "",
        steps: int = 28,
        guidance: float = 3.5,
        inversion_guidance: float | None = None,
        negative: str | None = None,
        gamma: float = 0.5,
        eta: float = 1.0,
        start: float = 0.0,
        stop: float = 0.25,
        decay: float = 0.0,
        times: str | None = None,
        seed: int = 0,
        arguments: Mapping[str, Any] | None = None,
        paper: bool = False,
    ) -> None:
        flow.require_flow(pipe, "RFInversion")
        self.gamma, self.eta = share(gamma, "RFInversion: gamma"), share(eta, "RFInversion: eta")
        self.decay = number(decay, "RFInversion: decay", low=0)
        given = (PUBLISHED if paper else LEVEL) if times is None else times
        self.times = one_of(given, "RFInversion: times", (LEVEL, PUBLISHED))
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            pipe,
            image,
            prompt,
            steps=steps,
            negative=negative,
            arguments=arguments,
            generator=generator if paper else None,
        )
        self.noise = noise_like(self.clean[:1], generator)
        self.source_prompt, self.guidance = source_prompt, float(guidance)
        upwards = 0.0 if paper else 1.0
        self.inversion_guidance = upwards if inversion_guidance is None else inversion_guidance
        slack = 0.0 if paper else 1e-9
        self.window = range(int(start * steps + slack), int(stop * steps + slack))
        if eta and start < stop and not self.window:
            raise InputError(
                f"RFInversion: start={start}, stop={stop} hold none of {steps} steps; give a later "
                "stop, or eta=0"
            )

    @checked()
    def run(self, *editors: Editor, output_type: str = "pil") -> Any:
        """Invert and draw; a list of images, or as output_type= has it.

        editors: active as the edit is drawn, and not in the inversion.
        """
        inverted, scales = self.invert(), [self.guidance] * len(self.prompts)
        with control(self.pipe, *editors) as self.session:
            program = self._program(self.prompts, scales)
            program.write(inverted)
            for i in range(program.steps):
                program.denoise(i, adjust=self._pull(program, i), **self._scales(scales))
            return program.decode(output_type)

    @torch.no_grad()
    def invert(self) -> Tensor:
        """The noise of the images, [images, ...] as the pipeline's scheduler has it."""
        n, scales = self.steps, [self.inversion_guidance] * len(self.prompts)
        program = self._program([self.source_prompt] * len(self.prompts), scales)
        x = self.clean.to(program.latents)
        y, noise = flow.wide(x), flow.wide(self.noise.to(x))
        levels = [level.noise for level in program.levels]
        for i in range(n):
            time, length = levels[n - i], levels[n - i - 1] - levels[n - i]
            if self.times == PUBLISHED:
                time, length = i / (n + 1), levels[i] - levels[i + 1]
            v = program.predict(y.to(x), sigma=time, **self._scales(scales))
            y = y + length * (v + self.gamma * ((noise - y) / (1 - time) - v))
        return y.to(x)

    def _pull(self, program: Trajectory, i: int) -> Callable[[Tensor], Tensor] | None:
        """What draws the result of a step to the image; None where nothing does."""
        n, image = self.steps, flow.wide(self.clean.to(program.latents))
        eta = self.eta * (1 - i / n) ** self.decay if i in self.window else 0.0
        kept = program.levels[i + 1].noise / program.levels[i].noise
        line = kept * flow.wide(program.latents) + (1 - kept) * image
        return (lambda x: ((1 - eta) * flow.wide(x) + eta * line).to(x)) if eta else None
