"""Real images made editable: what the inversion recipes share.

inverted = DirectInversion(pipe, image, "a red circle above a blue square").run()
edit = PromptToPrompt([inverted.prompt, "a green circle above a blue square"])
image_again, edited = inverted.edit(pipe, edit)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.editor import Editor
from hookctl.errors import InputError
from hookctl.loop.driven import Settle
from hookctl.loop.images import encode
from hookctl.loop.inversion import Correction, Progress
from hookctl.loop.trajectory import Trajectory
from hookctl.session import control


@dataclass(frozen=True, eq=False)
class Inverted:
    """A real image as latents, with what each step needs to lead back to it.

    prompt: that describes it; path: its latents at every level, noisiest first, [1, channels,
    height, width] each; start: the level that sampling starts from; corrections: of each step;
    guidance: scale for the source's rows, edit_guidance: for those of its edits unless told
    otherwise; negative: prompt of the unconditional rows; eta: of the scheduler's steps; editors:
    that belong to the method; size: (height, width) in pixels.
    """

    prompt: str
    path: tuple[Tensor, ...]
    corrections: tuple[Correction, ...]
    guidance: float
    edit_guidance: float
    size: tuple[int, int]
    timesteps: tuple[float, ...]
    start: int = 0
    negative: str | None = None
    eta: float = 0.0
    editors: tuple[Editor, ...] = ()

    @property
    def latents(self) -> Tensor:
        """What sampling starts from, [1, channels, height, width]."""
        return self.path[self.start]

    def reconstruct(self, pipe: Any, output_type: str = "pil") -> Any:
        """The image as the pipeline draws it again: a list of one."""
        return self.edit(pipe, output_type=output_type)

    def edit(
        self,
        pipe: Any,
        *editors: Editor,
        prompts: Sequence[str] | None = None,
        guidance: float | None = None,
        source_guidance: float | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Draw the image again and its edits beside it, under the control of editors.

        prompts: the image's, then those of the edits; by default the first editor's that has
        prompts. guidance: scale for the edits; source_guidance: for the source, by default the one
        that it was inverted for. output_type: as the pipeline's.

        Raises InputError for prompts that do not begin with the image's, and for a pipeline that
        samples otherwise than the one that the image was inverted with.
        """
        texts = self._prompts(editors, prompts)
        source = self.guidance if source_guidance is None else float(source_guidance)
        others = self.edit_guidance if guidance is None else float(guidance)
        scales = [source] + [others] * (len(texts) - 1)
        program = self.program(pipe, texts, max(scales))
        with control(pipe, *self.editors, *editors):
            for i in range(self.start, program.steps):
                correction = self.corrections[i]
                program.denoise(
                    i,
                    guidance=scales,
                    contexts=correction.contexts,
                    noise=correction.noise,
                    settle=_pinned(correction.target),
                )
        return program.decode(output_type)

    def program(self, pipe: Any, prompts: Sequence[str], guidance: float) -> Trajectory:
        """A program that stands at the start, from the image's latents for every prompt.

        guidance: the greatest scale that its steps will have.
        """
        height, width = self.size
        program = Trajectory(
            pipe,
            list(prompts),
            steps=len(self.corrections),
            guidance=guidance,
            negative=self.negative,
            latents=self.latents.repeat(len(prompts), 1, 1, 1),
            eta=self.eta,
            height=height,
            width=width,
        )
        if tuple(program.noise.timesteps) != self.timesteps:
            raise InputError(
                f"the image was inverted at the timesteps {_short(self.timesteps)}, but this "
                f"pipeline's scheduler takes {_short(program.noise.timesteps)}; use the scheduler "
                "that it was inverted with"
            )
        program.write(self.latents, level=self.start)
        return program

    def _prompts(self, editors: Sequence[Editor], prompts: Sequence[str] | None) -> list[str]:
        texts = prompts
        if texts is None:
            texts = next((e.prompts for e in editors if hasattr(e, "prompts")), [self.prompt])
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or texts[0] != self.prompt:
            raise InputError(
                f"prompts={texts} do not begin with {self.prompt!r}, as which the image was "
                "inverted; give the image's prompt first, then those of its edits"
            )
        return texts


class Inversion(ABC):
    """Base of the inversion recipes: images, their prompts and a pipeline.

    image: PIL, mode RGB, sides that the pipeline can draw; prompt: that describes it. Or a list
    of each, of images of one size, which are inverted in one batch. steps: of the sampling to
    come; guidance: scale for the source's rows in it.
    """

    edit_guidance = 7.5

    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        steps: int = 50,
        guidance: float = 7.5,
    ) -> None:
        self.single = isinstance(prompt, str)
        self.pipe, self.steps, self.guidance = pipe, int(steps), float(guidance)
        self.prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = [image] if self.single else list(image)
        name = type(self).__name__
        if len(images) != len(self.prompts) or not images:
            raise InputError(f"{name}: {len(images)} images and {len(self.prompts)} prompts")
        if self.steps < 1:
            raise InputError(f"{name}: steps={steps!r}; give a number from 1 on")
        sizes = {getattr(p, "size", None) for p in images}
        if len(sizes) > 1:
            raise InputError(f"{name}: images of the sizes {list(sizes)}; give them one size")
        clean = torch.cat([encode(pipe, p) for p in images])
        self.clean = clean.to(next(families.denoiser_of(pipe).parameters()).dtype)
        self.size = images[0].size[::-1]

    def run(self, progress: Progress | None = None) -> Any:
        """Invert: an `Inverted`, or a list of them where several images were given.

        progress: called with (steps done, steps in all) as the work goes on.
        """
        program = self._program()
        found = self._invert(program, progress)
        every = [_part(found, i, prompt) for i, prompt in enumerate(self.prompts)]
        return every[0] if self.single else every

    def _program(self, **options: Any) -> Trajectory:
        height, width = self.size
        given = {"steps": self.steps, "guidance": self.guidance, **options}
        return Trajectory(
            self.pipe, self.prompts, latents=self.clean, height=height, width=width, **given
        )

    @abstractmethod
    def _invert(self, program: Trajectory, progress: Progress | None) -> Inverted:
        """All images at once, every tensor with one entry for each."""

    def _found(
        self,
        program: Trajectory,
        path: Sequence[Tensor],
        corrections: Sequence[Correction] | None = None,
        **fields: Any,
    ) -> Inverted:
        given = [Correction()] * program.steps if corrections is None else corrections
        return Inverted(
            prompt="",
            path=tuple(path),
            corrections=tuple(given),
            **{
                "guidance": self.guidance,
                "edit_guidance": self.edit_guidance,
                "size": self.size,
                "timesteps": tuple(program.noise.timesteps),
                **fields,
            },
        )


def _part(every: Inverted, i: int, prompt: str) -> Inverted:
    """One image of several that were inverted together."""

    def one(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[i : i + 1]

    corrections = tuple(
        Correction(_contexts(c.contexts, i), one(c.noise), one(c.target)) for c in every.corrections
    )
    path = tuple(x[i : i + 1] for x in every.path)
    return replace(every, prompt=prompt, path=path, corrections=corrections)


def _contexts(contexts: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: text[i : i + 1] for name, text in contexts.items()}


def _pinned(target: Tensor | None) -> Settle | None:
    """Sets the first image's latents after a step; the others stay."""
    if target is None:
        return None
    return lambda x: torch.cat([target.to(x), x[1:]])


def _short(times: Sequence[float]) -> str:
    shown = ", ".join(f"{t:g}" for t in times[:3])
    return f"{shown} ... ({len(times)})" if len(times) > 3 else shown
