"""What a program stands on: the prepared run of a pipeline, its levels and its predictions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.address.families.loops import PLAIN, Scales
from hookctl.address.rows import UNCOND
from hookctl.arguments import checked
from hookctl.errors import InputError
from hookctl.loop.checks import check_noise, texts_of
from hookctl.loop.driven import Scaling
from hookctl.loop.guidance import (
    Guidance,
    combined,
    guidance_scales,
    needed_branches,
    per_image,
)
from hookctl.loop.images import decode
from hookctl.loop.moments import Moment, Moments
from hookctl.loop.noise import Level, Noise
from hookctl.loop.packing import packed, side_of_token, unpacked
from hookctl.loop.pattern import EMBEDDED, Template, Texts
from hookctl.loop.program_arguments import call_arguments
from hookctl.loop.program_calls import ProgramCalls, Question
from hookctl.loop.solver import Solver
from hookctl.loop.template import prepare

Generators = torch.Generator | Sequence[torch.Generator]


class Program:
    """A prepared run: asks its denoiser, and knows its levels. See `Trajectory`."""

    @checked()
    def __init__(
        self,
        pipe: Any,
        prompts: str | Sequence[str],
        *,
        steps: int = 50,
        guidance: float = 1.0,
        negative: str | Sequence[str] | None = None,
        embedded: float | None = None,
        images: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        **arguments: Any,
    ) -> None:
        self.denoiser = families.denoiser_of(pipe)  # first: what has none is no pipeline
        texts, loop = texts_of(prompts), families.loop_of(pipe) or PLAIN
        check_noise(pipe, len(texts) * images, eta, generator, latents)
        self._arguments = call_arguments(
            pipe,
            loop,
            texts,
            arguments,
            steps=steps,
            guidance=guidance,
            negative=negative,
            embedded=embedded,
            images=images,
            generator=generator,
            latents=latents,
        )
        self.pipe, self.prompts, self.images = pipe, tuple(texts), images
        self.guidance, self.eta, self.generator = guidance, eta, generator
        self.template: Template = prepare(pipe, self._arguments, len(texts), images)
        if guidance > 1 and UNCOND not in self.template.branches:
            raise InputError(
                f"guidance={guidance}: this {type(pipe).__name__} makes no unconditional rows, its "
                "model is distilled; give guidance=1"
            )
        if embedded is not None and self.template.arguments.get(EMBEDDED) is None:
            raise InputError(
                f"embedded={embedded}: this {type(families.denoiser_of(pipe)).__name__} was taught "
                "no scale of guidance; leave it out"
            )
        self.solver = Solver(pipe.scheduler)
        # Of its own, so that another run on this pipeline does not change the levels of this one.
        self.noise = Noise(copy.copy(pipe.scheduler))
        self.levels: list[Level] = self.noise.levels()
        self.steps = len(self.solver.entries)
        self.latents, self.level, self.start = self.template.latents, 0, 0
        self.size = self._size_in_px()
        self._moments = Moments(self.solver, self.noise, self.levels)
        self._calls = ProgramCalls(self, pipe, self.template, self.prompts, images)

    def _size_in_px(self) -> tuple[int, int] | None:
        cells = self.template.grid
        if self.latents.dim() == 3 and cells:
            side = side_of_token(self.pipe)
            return cells[-2] * side, cells[-1] * side
        height, width = (int(self._arguments.get(side) or 0) for side in ("height", "width"))
        return (height, width) if height and width else None

    # -- predictions ---------------------------------------------------------------------------

    def predict(
        self,
        x: Tensor,
        i: int | None = None,
        guidance: Guidance | None = None,
        contexts: Texts | None = None,
        *,
        sigma: float | None = None,
        embedded: Guidance | None = None,
        prompt: int | None = None,
    ) -> Tensor:
        """The guided prediction for latents at level i, without a step. Gradients as outside.

        x: [images, ...]. sigma: in place of i, any share of noise from 0 to 1 (flow matching), at
        levels or between. guidance, embedded: scales in place of the run's, one or one for each
        image. contexts: branch -> text embeddings in place of the prompts'. prompt: index of the
        one whose conditions all images of x get, None for each its own.
        What comes is what the scheduler's step would be given: for flow matching eps - x0.

        At the last level, which no timestep of the run stands for, the timestep is 0.
        """
        moment = self._moment(i, sigma)
        scales = self._scales(guidance, x, moment)
        which = needed_branches(scales, self.template.branches)
        parts = self._asked(x, moment, which, contexts, embedded, prompt)
        return combined(parts, scales, self.template)

    def branches(
        self,
        x: Tensor,
        i: int | None = None,
        which: Sequence[str] | None = None,
        contexts: Texts | None = None,
        *,
        sigma: float | None = None,
        embedded: Guidance | None = None,
        prompt: int | None = None,
    ) -> dict[str, Tensor]:
        """Branch -> prediction [images, ...] for latents at level i, of all branches or some.

        The other arguments are those of `predict`.
        """
        names = self.template.branches if which is None else tuple(which)
        if unknown := sorted(set(names) - set(self.template.branches)):
            named = ", ".join(unknown)
            raise InputError(f"this run has no {named} rows; make it with guidance= above 1")
        return self._asked(x, self._moment(i, sigma), names, contexts, embedded, prompt)

    def _asked(
        self,
        x: Tensor,
        moment: Moment,
        names: Sequence[str],
        contexts: Texts | None,
        embedded: Guidance | None,
        prompt: int | None,
    ) -> dict[str, Tensor]:
        question = self._question(x, moment, names, contexts, embedded, prompt)

        def scaled(rows: Tensor) -> Scaling | None:
            size = moment.size
            return None if size == 1.0 else Scaling(rows, lambda latents: latents / size)

        return self._calls.ask(question, scaled)[0]

    def _question(
        self,
        x: Tensor,
        moment: Moment,
        names: Sequence[str],
        contexts: Texts | None,
        embedded: Guidance | None,
        prompt: int | None = None,
    ) -> Question:
        if prompt is not None and not 0 <= prompt < len(self.prompts):
            raise InputError(
                f"prompt={prompt}; this run has the prompts 0 to {len(self.prompts) - 1}"
            )
        scale = None if embedded is None else per_image(embedded, x, "embedded")
        return Question(x, moment, names, contexts, scale, prompt)

    # -- forms of the latents ------------------------------------------------------------------

    def unpacked(self, latents: Tensor | None = None) -> Tensor:
        """Latents, by default the present ones, as a grid: [images, channels, (frames,) height,
        width], for masks, blends and noise. Those of most families are one already."""
        x = self.latents if latents is None else latents
        return unpacked(self.pipe, x, self.template.grid)

    def packed(self, latents: Tensor) -> Tensor:
        """A grid of latents in the form of the run's: the inverse of `unpacked`."""
        return packed(self.pipe, latents)

    @checked()
    def decode(self, output_type: str = "pil") -> Any:
        """The latents as images, as the pipeline's own output_type= has them."""
        cells = self.template.grid
        return decode(
            self.pipe,
            self.latents,
            output_type,
            size=self.size,
            frames=cells[0] if len(cells) == 3 else 1,
            options=self._arguments,
        )

    # -- numbers -------------------------------------------------------------------------------

    def _moment(self, i: int | None, sigma: float | None) -> Moment:
        if (i is None) == (sigma is None):
            raise InputError(f"level {i}, sigma {sigma}; give one of them")
        if i is not None:
            return self._moments.at_level(i, self.start)
        assert sigma is not None
        return self._moments.at_sigma(sigma, self.start)

    def _scales(self, guidance: Guidance | None, x: Tensor, moment: Moment) -> Scales:
        loop, time = self.template.loop, float(moment.time)
        if guidance is None:
            guidance = self.guidance
            second = loop.second_scale and self._arguments.get(loop.second_scale)
            if second is not None and self._calls.denoiser(moment) is not self.denoiser:
                guidance = float(second) if UNCOND in self.template.branches else 1.0
        scales = guidance_scales(guidance, x, self.template.branches)
        return loop.at(scales, time, self.template.settings)

    def factors(self, i: int) -> tuple[float, float]:
        """(alpha, beta) of step i, x' = alpha x + beta prediction, as a first-order one.

        So are the deterministic steps of DDIM, Euler and flow matching, whatever is predicted.
        """
        here, there = self.levels[i], self.noise.after(self.noise.timesteps[i])
        return self.noise.factors(here, there)
