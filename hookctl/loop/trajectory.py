"""Programs: a pipeline's denoising, step by step and in any order.

    program = Trajectory(pipe, ["a red circle"], steps=25, guidance=3.0, generator=generator)
    for i in range(program.steps):
        program.denoise(i)
    images = program.decode()

draws, bit for bit, what `pipe(...)` draws. Levels are numbered from 0 (noisiest) to `steps`
(clean); `denoise(i)` leads from level i to i + 1, `invert(i)` back, `renoise(i, j)` back by fresh
noise, `write` replaces latents. Within `hookctl.control(pipe, ...)` the editors see every call, as
they do when the pipeline runs itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookctl.arguments import checked, refusal
from hookctl.errors import InputError
from hookctl.loop.checks import broadcasts
from hookctl.loop.driven import Adjust, adjusted, driving
from hookctl.loop.guidance import Guidance, combined, needed_branches
from hookctl.loop.pattern import Texts
from hookctl.loop.program import Generators, Program


class Trajectory(Program):
    """One run of a pipeline, driven from outside.

    prompts: a text, or several; images: images of each. guidance: scale of classifier-free
    guidance as u + scale (c - u) counts it, whatever the pipeline calls it (`true_cfg_scale`, or
    a scale from 0 for Z-Image); up to 1 there are no unconditional rows. negative: for the
    unconditional rows. embedded: the scale that a model was taught (FLUX.1 dev, Kontext,
    HunyuanVideo: the `guidance_scale` of their calls), None for the pipeline's own.
    generator, latents: as the pipeline takes them. eta: share of fresh noise in every step, for
    schedulers that have it. arguments: further ones of the pipeline's call (height, width,
    prompt_embeds in the prompts' place, the image of an edit pipeline ...).
    latents: as the pipeline's scheduler has them, [images, channels, (frames,) height, width] or
    [images, tokens, channels] where it packs them (`unpacked`); level: the one they are
    at; levels: signal and noise of each, `steps` + 1 of them; size: (height, width) in px, or None;
    start: the level that the run begins at, from which windows count; assign it before.

    Raises UnsupportedError for pipelines whose loop is more than denoiser calls, guidance, a step.
    """

    # -- the operations ------------------------------------------------------------------------

    @torch.no_grad()
    @checked()
    def denoise(
        self,
        i: int,
        *,
        guidance: Guidance | None = None,
        contexts: Texts | None = None,
        embedded: Guidance | None = None,
        eta: float | None = None,
        noise: Tensor | None = None,
        adjust: Adjust | None = None,
    ) -> Tensor:
        """One step, from level i to i + 1; returns the new latents.

        guidance: scale in place of the run's, one or one for each image; 1 for all leaves the
        unconditional rows out; embedded: likewise the scale that the model was taught. contexts:
        branch -> text embeddings [1 | images, tokens, channels] in place of the prompts'. eta: in
        place of the run's; noise: [images, ...] in place of the step's fresh noise. adjust:
        changes the step's result, such as by an offset, before any editor's `after` sees it.
        """
        self._at(i, "denoise")
        self.solver.enter(i)
        x, entries = self.latents, self.solver.entries[i]
        for entry in entries:
            last, moment = entry == entries[-1], self._moments.at_entry(entry, self.start)
            scales = self._scales(guidance, x, moment)
            branches = needed_branches(scales, self.template.branches)
            parts, call = self._calls.ask(
                self._question(x, moment, branches, contexts, embedded),
                partial(self.solver.scaling, entry=entry),
                stepping=True,
                adjust=adjust if last else None,
            )
            with driving(call):
                x = self.solver.step(
                    combined(parts, scales, self.template),
                    entry,
                    x,
                    eta=self.eta if eta is None else eta,
                    generator=self.generator,
                    noise=noise,
                )
                x = adjusted(x)
        self.latents, self.level = x, i + 1
        self.solver.leave(i + 1)
        return x

    @torch.no_grad()
    @checked()
    def invert(
        self,
        i: int,
        *,
        guidance: Guidance | None = 1.0,
        contexts: Texts | None = None,
        embedded: Guidance | None = None,
        refine: int = 0,
        timestep: str = "target",
    ) -> Tensor:
        """Undo step i, from level i + 1 back to i; returns the new latents.

        The step is taken as the first-order deterministic one (DDIM, Euler), whose prediction
        belongs to latents that are not known yet. timestep: "target" takes the prediction at the
        timestep of level i (what the published code does), "source" at that of level i + 1.
        refine: so many times more, predict anew for the latents just found ("target" only). At the
        fixed point, to which this tends, `denoise(i)` leads exactly back.
        """
        self._at(i + 1, "invert", last=self.steps)
        if timestep not in ("target", "source"):
            raise InputError(f"timestep={timestep!r}; give 'target' or 'source'")
        if refine and timestep == "source":
            raise InputError("refine tends to the inverse of a step for timestep='target' only")
        here, there, x = self.levels[i + 1], self.levels[i], self.latents
        if timestep == "source":
            prediction = self.predict(x, i + 1, guidance, contexts, embedded=embedded)
            found = there.mix(*self.noise.split(_wide(x), _wide(prediction), here)).to(x.dtype)
        else:
            found = x if self.noise.flow else x * (there.size / here.size)
            for _ in range(refine + 1):
                prediction = self.predict(found, i, guidance, contexts, embedded=embedded)
                found = self._undone(x, prediction, i)
        self.latents, self.level = found, i
        return found

    @checked()
    def renoise(self, i: int, j: int, generator: Generators) -> Tensor:
        """Diffuse from level i to the noisier level j with fresh noise from the generator(s)."""
        self._at(i, "renoise", last=self.steps)
        if not 0 <= j <= i:
            raise InputError(f"renoise({i}, {j}): give a level from 0 to {i}")
        here, there, x = self.levels[i], self.levels[j], self.latents
        if isinstance(generator, torch.Generator):
            self.latents = self.noise.renoise(x, here, there, generator)
        elif len(generator) == len(x):
            pairs = zip(x.split(1), generator, strict=True)
            self.latents = torch.cat([self.noise.renoise(a, here, there, g) for a, g in pairs])
        else:
            raise InputError(f"{len(generator)} generators for {len(x)} images")
        self.level = j
        return self.latents

    @checked()
    def write(
        self, latents: Tensor, mask: Tensor | None = None, *, level: int | None = None
    ) -> None:
        """Replace the latents, [1 | images, ...], where the mask (1: replace, 0: keep) says so.

        latents: in the run's form or unpacked; mask: broadcasts to the unpacked latents, or to the
        run's, None for everywhere; level: the one that they are at from now on.
        """
        if level is not None and not 0 <= level <= self.steps:
            raise InputError(f"level={level}; this run has the levels 0 to {self.steps}")
        now, given = self.latents, latents
        if latents.dim() != now.dim() and self._is_grid(latents):
            latents = self.packed(latents)
        if latents.shape[1:] != now.shape[1:] or latents.shape[0] not in (1, len(now)):
            raise InputError(f"latents {tuple(given.shape)}; this run draws {tuple(now.shape)}")
        new = latents.to(now).expand_as(now)
        if mask is not None:
            m = self._mask(mask)
            new = m * new + (1 - m) * now
        self.latents = new
        self.level = self.level if level is None else level

    def _is_grid(self, latents: Tensor) -> bool:
        return latents.shape[1:] == self.unpacked().shape[1:]

    def _mask(self, mask: Tensor) -> Tensor:
        """A mask in the form of the run's latents."""
        now, grid = self.latents, self.unpacked()
        if now.dim() != grid.dim() and broadcasts(mask, grid):
            return self.packed(mask.to(now).expand_as(grid))
        if not broadcasts(mask, now):
            forms = dict.fromkeys([tuple(grid.shape), tuple(now.shape)])
            wanted = f"one that broadcasts to the latents {' or '.join(map(str, forms))}"
            raise refusal("Trajectory.write: mask", mask, wanted)
        return mask.to(now)

    def run(self, **options: Any) -> Tensor:
        """Denoise from the present level to the end; `options` as for `denoise`."""
        for i in range(self.level, self.steps):
            self.denoise(i, **options)
        return self.latents

    # -- numbers -------------------------------------------------------------------------------

    def _at(self, level: int, operation: str, last: int | None = None) -> None:
        lowest = 1 if operation == "invert" else 0
        if not lowest <= level <= (self.steps - 1 if last is None else last):
            raise InputError(f"{operation}: this run has the steps 0 to {self.steps - 1}")
        if level != self.level:
            raise InputError(
                f"{operation}: the latents are at level {self.level}, not at {level}; "
                "write(latents, level=) sets both"
            )

    def _undone(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The latents at level i from which the prediction leads to x at level i + 1."""
        alpha, beta = self.factors(i)
        if abs(alpha) < 1e-8:
            raise InputError(
                f"step {i} can't be undone, it keeps nothing of its latents; take more steps"
            )
        return ((_wide(x) - beta * _wide(prediction)) / alpha).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In single precision at least: half has too few bits for the difference of two latents."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
