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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.arguments import checked, refusal
from hookctl.errors import InputError
from hookctl.loop.checks import broadcasts, check_noise, texts_of
from hookctl.loop.driven import Adjust, Scaling, adjusted, driving
from hookctl.loop.guidance import Guidance, Scales, combined, guidance_scales, needed_branches
from hookctl.loop.images import decode
from hookctl.loop.noise import Level, Noise
from hookctl.loop.program_calls import ProgramCalls, Texts
from hookctl.loop.solver import Solver
from hookctl.loop.template import Template, prepare

Generators = torch.Generator | Sequence[torch.Generator]


class Trajectory:
    """One run of a pipeline, driven from outside.

    prompts: a text, or several; images: images of each. guidance: scale of classifier-free
    guidance; up to 1 there are no unconditional rows. negative: for the unconditional rows.
    generator, latents: as the pipeline takes them. eta: share of fresh noise in every step, for
    schedulers that have it. arguments: further ones of the pipeline's call (height, width,
    prompt_embeds in the prompts' place ...).
    latents: [images, channels, height, width] in the scheduler's space; level: the one they are
    at; levels: signal and noise of each, `steps` + 1 of them; size: (height, width) in px, or None;
    start: the level that the run begins at, from which windows count; assign it before.

    Raises UnsupportedError for pipelines whose loop is more than a denoiser call, guidance, a step.
    """

    @checked()
    def __init__(
        self,
        pipe: Any,
        prompts: str | Sequence[str],
        *,
        steps: int = 50,
        guidance: float = 1.0,
        negative: str | Sequence[str] | None = None,
        images: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        **arguments: Any,
    ) -> None:
        texts = texts_of(prompts)
        check_noise(pipe, len(texts) * images, eta, generator, latents)
        if guidance > 1 and negative is not None:
            arguments["negative_prompt"] = (
                [negative] * len(texts) if isinstance(negative, str) else list(negative)
            )
        arguments |= {
            "prompt": None if arguments.get("prompt_embeds") is not None else texts,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "num_images_per_prompt": images,
            "generator": generator,
            "latents": latents,
        }
        self.pipe, self.prompts, self.images = pipe, tuple(texts), images
        height, width = (int(arguments.get(side) or 0) for side in ("height", "width"))
        self.size = (height, width) if height and width else None
        self.guidance, self.eta, self.generator = guidance, eta, generator
        self.template: Template = prepare(pipe, arguments, len(texts), images)
        self.denoiser = families.denoiser_of(pipe)
        self.solver = Solver(pipe.scheduler)
        self.noise = Noise(pipe.scheduler)
        self.levels: list[Level] = self.noise.levels()
        self.steps = len(self.solver.entries)
        self.latents, self.level, self.start = self.template.latents, 0, 0
        own = self.denoiser, self.template, self.solver, self.prompts
        self._calls = ProgramCalls(self, *own, images)

    # -- the operations ------------------------------------------------------------------------

    @torch.no_grad()
    @checked()
    def denoise(
        self,
        i: int,
        *,
        guidance: Guidance | None = None,
        contexts: Texts | None = None,
        eta: float | None = None,
        noise: Tensor | None = None,
        adjust: Adjust | None = None,
    ) -> Tensor:
        """One step, from level i to i + 1; returns the new latents.

        guidance: scale in place of the run's, one or one for each image; 1 for all leaves the
        unconditional rows out. contexts: branch -> text embeddings [1 | images, tokens,
        channels] in place of the prompts'. eta: in place of the run's; noise: [images, ...] in
        place of the step's fresh noise. adjust: changes the step's result, such as by an offset,
        before any editor's `after` sees it.
        """
        self._at(i, "denoise")
        scales = self._scales(guidance)
        self.solver.enter(i)
        x, entries = self.latents, self.solver.entries[i]
        for entry in entries:
            last = entry == entries[-1]
            branches = needed_branches(scales, self.template.branches)
            call = self._calls.call(branches, entry, self.start)
            call.stepping, call.adjust = True, adjust if last else None
            many = torch.cat([x] * (len(call.rows) // len(x)))
            call.scaling = self.solver.scaling(many, entry)
            with driving(call):
                model_input = call.scaling.again(many) if call.scaling else many
                parts = self._calls.predict(call, model_input, entry, contexts)
                x = self.solver.step(
                    combined(parts, scales),
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
            known = i + 1 < self.steps
            prediction = self.predict(x, i + 1 if known else self.steps, guidance, contexts)
            found = there.mix(*self.noise.split(x, prediction, here))
        else:
            found = x if self.noise.flow else x * (there.size / here.size)
            for _ in range(refine + 1):
                prediction = self.predict(found, i, guidance, contexts)
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

        mask: broadcasts to the latents, None for everywhere; level: the one that they are at from
        now on.
        """
        if level is not None and not 0 <= level <= self.steps:
            raise InputError(f"level={level}; this run has the levels 0 to {self.steps}")
        now = self.latents
        if latents.shape[1:] != now.shape[1:] or latents.shape[0] not in (1, len(now)):
            raise InputError(f"latents {tuple(latents.shape)}; this run draws {tuple(now.shape)}")
        new = latents.to(now).expand_as(now)
        if mask is not None:
            if not broadcasts(mask, now):
                wanted = f"one that broadcasts to the latents {tuple(now.shape)}"
                raise refusal("Trajectory.write: mask", mask, wanted)
            m = mask.to(now)
            new = m * new + (1 - m) * now
        self.latents = new
        self.level = self.level if level is None else level

    def run(self, **options: Any) -> Tensor:
        """Denoise from the present level to the end; `options` as for `denoise`."""
        for i in range(self.level, self.steps):
            self.denoise(i, **options)
        return self.latents

    @checked()
    def decode(self, output_type: str = "pil") -> Any:
        """The latents as images, as the pipeline's own output_type= has them."""
        return decode(self.pipe, self.latents, output_type, size=self.size)

    # -- predictions ---------------------------------------------------------------------------

    def predict(
        self, x: Tensor, i: int, guidance: Guidance | None = None, contexts: Texts | None = None
    ) -> Tensor:
        """The guided prediction for latents at level i, without a step. Gradients as outside.

        At the last level, which no timestep of the run stands for, the timestep is 0.
        """
        scales = self._scales(guidance)
        return combined(
            self.branches(x, i, needed_branches(scales, self.template.branches), contexts), scales
        )

    def branches(
        self,
        x: Tensor,
        i: int,
        which: Sequence[str] | None = None,
        contexts: Texts | None = None,
    ) -> dict[str, Tensor]:
        """Branch -> prediction [images, ...] for latents at level i, of all branches or some."""
        names = self.template.branches if which is None else tuple(which)
        if unknown := sorted(set(names) - set(self.template.branches)):
            named = ", ".join(unknown)
            raise InputError(f"this run has no {named} rows; make it with guidance= above 1")
        entry = self.solver.entries[i][0] if i < self.steps else None
        call = self._calls.call(names, entry, self.start)
        size = 1.0 if self.noise.flow else self.levels[i].size
        given = many = torch.cat([x] * len(names))
        if size != 1.0:
            given = many / size
            call.scaling = Scaling(many, lambda latents: latents / size)
        with driving(call):
            return self._calls.predict(call, given, entry, contexts)

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

    def _scales(self, guidance: Guidance | None) -> Scales:
        guidance = self.guidance if guidance is None else guidance
        return guidance_scales(guidance, self.latents, self.template.branches)

    def factors(self, i: int) -> tuple[float, float]:
        """(alpha, beta) of step i, x' = alpha x + beta prediction, as a first-order one.

        So are the deterministic steps of DDIM, Euler and flow matching, whatever is predicted.
        """
        here, there = self.levels[i], self.noise.after(self.noise.timesteps[i])
        return self.noise.factors(here, there)

    def _undone(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The latents at level i from which the prediction leads to x at level i + 1."""
        alpha, beta = self.factors(i)
        if abs(alpha) < 1e-8:
            raise InputError(
                f"step {i} can't be undone, it keeps nothing of its latents; take more steps"
            )
        return (x - beta * prediction) / alpha
