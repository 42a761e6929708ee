"""A real image as latents, with what each step of a pipeline needs to lead back to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hookctl.arguments import checked
from hookctl.editor import Editor
from hookctl.errors import InputError
from hookctl.loop.driven import Adjust
from hookctl.loop.inversion import Correction
from hookctl.loop.program_arguments import check_names
from hookctl.loop.trajectory import Trajectory
from hookctl.session import control


@dataclass(frozen=True, eq=False)
class Inverted:
    """A real image, ready to be drawn again and edited.

    prompt: that describes it; path: its latents at every level, noisiest first, [1, channels,
    height, width] each or as the pipeline's scheduler has them; corrections: of each step;
    guidance: scale for the source's rows; embedded: likewise the scale that its model was taught,
    None for the pipeline's; edit_guidance: for those of its edits, unless `edit` is given another;
    size: (height, width) in px; timesteps: that it was inverted at; start: the level that sampling
    starts from; negative: prompt of the unconditional rows; eta: share of fresh noise in the
    scheduler's steps; editors: that belong to the method; arguments: further ones of the
    pipeline's call; source_contexts: texts of the source's rows where they are not the
    corrections', branch -> [1, tokens, channels].
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
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source_contexts: Mapping[str, Tensor] = field(default_factory=dict)
    embedded: float | None = None

    @property
    def latents(self) -> Tensor:
        """What sampling starts from, [1, channels, height, width] or as the scheduler has them."""
        return self.path[self.start]

    @checked()
    def reconstruct(self, pipe: Any, output_type: str = "pil") -> Any:
        """The image as the pipeline draws it again: a list of one."""
        return self.edit(pipe, output_type=output_type)

    @checked()
    def edit(
        self,
        pipe: Any,
        *editors: Editor,
        prompts: Sequence[str] | None = None,
        guidance: float | None = None,
        source_guidance: float | None = None,
        embedded: float | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Draw the image again and its edits beside it, under the control of editors.

        prompts: the image's, then those of the edits; by default those of the first editor that
        has prompts. guidance: scale for the edits; source_guidance: for the source, by default the
        one that it was inverted for. embedded: the scale that a model was taught, for the edits; by
        default the source's. output_type: as the pipeline's.

        Raises InputError for prompts that do not begin with the image's, and for a pipeline that
        samples otherwise than the one that the image was inverted with.
        """
        texts = self._prompts(editors, prompts)
        source = self.guidance if source_guidance is None else float(source_guidance)
        others = self.edit_guidance if guidance is None else float(guidance)
        scales = [source] + [others] * (len(texts) - 1)
        taught = None if embedded is None else self._taught(pipe, float(embedded), len(texts))
        program = self.program(pipe, texts, max(scales))
        with control(pipe, *self.editors, *editors):
            for step in range(self.start, program.steps):
                correction = self.corrections[step]
                program.denoise(
                    step,
                    guidance=scales,
                    embedded=taught,
                    contexts=self._contexts(correction, len(texts)),
                    noise=correction.noise,
                    adjust=_first_image_set_to(correction.target),
                )
        return program.decode(output_type)

    def _taught(self, pipe: Any, edits: float, prompts: int) -> list[float]:
        """The scales that the model was taught, the source's first."""
        own = self.embedded
        if own is None:
            own = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
        return [float(own)] + [edits] * (prompts - 1)

    def _contexts(self, correction: Correction, prompts: int) -> Mapping[str, Tensor]:
        """The texts of a step, for the source and its edits."""
        apart = {
            name: torch.cat([text, *[correction.contexts[name]] * (prompts - 1)])
            for name, text in self.source_contexts.items()
        }
        return {**correction.contexts, **apart}

    def program(self, pipe: Any, prompts: Sequence[str], guidance: float) -> Trajectory:
        """A program that stands at the start, from the image's latents for every prompt.

        guidance: the greatest scale that its steps will have. Raises InputError for a pipeline with
        other timesteps than those of the inversion.
        """
        height, width = self.size
        program = Trajectory(
            pipe,
            list(prompts),
            steps=len(self.corrections),
            guidance=guidance,
            negative=self.negative,
            embedded=self.embedded,
            latents=self.latents.repeat(len(prompts), *[1] * (self.latents.dim() - 1)),
            eta=self.eta,
            height=height,
            width=width,
            **self.arguments,
        )
        if tuple(program.noise.timesteps) != self.timesteps:
            raise InputError(
                f"the image was inverted at the timesteps {_shown(self.timesteps)}, but this "
                f"pipeline's scheduler takes {_shown(program.noise.timesteps)}; use the scheduler "
                "that it was inverted with"
            )
        program.write(self.latents, level=self.start)
        program.start = self.start
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


# What an inversion gives the pipeline itself.
_OWN = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "num_images_per_prompt",
    "guidance_scale",
    "latents",
    "generator",
    "eta",
    "height",
    "width",
    "output_type",
)


def call_arguments(pipe: Any, given: Mapping[str, Any] | None, who: str) -> dict[str, Any]:
    """Further arguments of a pipeline's call; InputError for those that an inversion gives it."""
    if given is not None and not (
        isinstance(given, Mapping) and all(isinstance(name, str) for name in given)
    ):
        raise InputError(
            f"{who}: arguments={given!r}; give a mapping, name -> value, of the pipeline's call"
        )
    if own := [name for name in given or () if name in _OWN]:
        raise InputError(
            f"{who}: arguments={own} are given to the pipeline by the inversion; leave them out"
        )
    check_names(pipe, given or {}, who)
    return dict(given or {})


def image_of(batch: Inverted, index: int, prompt: str) -> Inverted:
    """One of several images that were inverted in one batch."""

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[index : index + 1]

    def contexts(of_batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: text[index : index + 1] for name, text in of_batch.items()}

    corrections = tuple(
        Correction(contexts(c.contexts), part(c.noise), part(c.target)) for c in batch.corrections
    )
    path = tuple(x[index : index + 1] for x in batch.path)
    return replace(
        batch,
        prompt=prompt,
        path=path,
        corrections=corrections,
        source_contexts=contexts(batch.source_contexts),
    )


def _first_image_set_to(target: Tensor | None) -> Adjust | None:
    """Sets the first image's latents after a step; the others stay."""
    if target is None:
        return None
    return lambda x: torch.cat([target.to(x), x[1:]])


def _shown(times: Sequence[float]) -> str:
    shown = ", ".join(f"{t:g}" for t in times[:3])
    return f"{shown} ... ({len(times)})" if len(times) > 3 else shown
