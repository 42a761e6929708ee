"""The denoiser calls of a program, made after the pattern of the pipeline's own first ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address import families, pipelines
from hookctl.address.families import handing
from hookctl.address.rows import COND
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.driven import Adjust, Driven, Scaling, driving
from hookctl.loop.moments import Moment
from hookctl.loop.outputs import stacked
from hookctl.loop.pattern import EMBEDDED, Chosen, Template, Texts
from hookctl.loop.state import split_branches

Scaled = Callable[[Tensor], Scaling | None]  # of the latents of a call, [rows, ...]


@dataclass(frozen=True, eq=False)
class Question:
    """What a program asks its denoiser.

    latents: [images, ...]; branches: of which; contexts: texts in place of the prompts'; embedded:
    scale that the model was taught, one or [images, 1, ...], in place of the run's; prompt: the
    one whose conditions the images get, None for each its own.
    """

    latents: Tensor
    moment: Moment
    branches: Sequence[str]
    contexts: Texts | None = None
    embedded: float | Tensor | None = None
    prompt: int | None = None


class ProgramCalls:
    """Makes the denoiser calls of one program and tells the hooks of each whose and when it is."""

    def __init__(
        self, program: Any, pipe: Any, template: Template, prompts: tuple[str, ...], images: int
    ) -> None:
        self._program, self._pipe, self._template = program, pipe, template
        self._prompts, self._images = prompts, images

    def denoiser(self, moment: Moment) -> nn.Module:
        """The denoiser that the pipeline asks at this time."""
        name = self._template.loop.denoiser(self._pipe, float(moment.time))
        held = None if name is None else getattr(self._pipe, name)
        return families.denoiser_of(self._pipe) if held is None else held

    def ask(
        self,
        question: Question,
        scaled: Scaled = lambda rows: None,
        *,
        stepping: bool = False,
        adjust: Adjust | None = None,
    ) -> tuple[dict[str, Tensor], Driven]:
        """Branch -> prediction [images, ...] as the scheduler wants it, and the last call.

        scaled: how the latents become the model input; stepping, adjust: of the step that follows
        (`Driven`). Raises InputError for texts of branches that the run does not have.
        """
        known = self._template.branches
        if question.contexts and (unknown := set(question.contexts) - set(known)):
            raise InputError(
                f"contexts for {', '.join(sorted(unknown))}; this run has {', '.join(known)} rows"
            )
        found: dict[str, Tensor] = {}
        for chosen in self._chosen(question):
            call = self._driven(question.moment, chosen)
            call.stepping, call.adjust = stepping, adjust
            found |= self._predicted(question, chosen, call, scaled)
        return found, call

    def _chosen(self, question: Question) -> list[Chosen]:
        chosen = self._template.chosen(question.branches, question.prompt)
        images = len(chosen[0].rows.where(branch=chosen[0].rows[0].branch)) if chosen else 0
        if images != len(question.latents):
            of = "" if question.prompt is None else f" of prompt {question.prompt}"
            raise InputError(f"{len(question.latents)} latents for {images} images{of}")
        return chosen

    def _driven(self, moment: Moment, chosen: Chosen) -> Driven:
        return Driven(
            program=self._program,
            denoiser=families.uncompiled(self.denoiser(moment)),
            prompts=self._prompts,
            images_per_prompt=self._images,
            encoding=self._template.encoding,
            rows=chosen.rows,
            clock=moment.clock,
        )

    def _predicted(
        self, question: Question, chosen: Chosen, call: Driven, scaled: Scaled
    ) -> dict[str, Tensor]:
        x, template, moment = question.latents, self._template, question.moment
        groups = len(chosen.rows) // len(x)
        many = torch.cat([x] * groups)
        denoiser = self.denoiser(moment)
        call.scaling = scaled(many)
        arguments = template.call(
            chosen,
            call.scaling.again(many) if call.scaling else many,
            template.loop.time(moment.time, x),
            question.contexts,
            self._embedded(question.embedded, x, groups),
        )
        with driving(call), _named(self._pipe, denoiser, call):
            prediction = stacked(denoiser(**arguments))
        assert prediction is not None  # every family's denoiser returns one
        branches = split_branches(call.rows, prediction)
        return {name: self._handed(part, arguments, x) for name, part in branches.items()}

    def _handed(self, prediction: Tensor, arguments: dict[str, Any], x: Tensor) -> Tensor:
        """A branch's prediction as the pipeline hands it to the scheduler."""
        declared = families.pipeline_of(self._pipe)
        step = handing.Step(self._pipe, arguments, self._template.sample, x, x, x)
        own = None if declared is None else declared.handing
        return handing.own_part(prediction if own is None else own(prediction, step), step)

    def _embedded(self, scale: float | Tensor | None, x: Tensor, groups: int) -> Tensor | None:
        """The scale that the model was taught as the denoiser takes it, [rows]."""
        if scale is None:
            return None
        factor, given = self._template.loop.embedded, self._template.arguments.get(EMBEDDED)
        if factor is None or given is None:
            raise UnsupportedError(
                f"embedded={scale!r}: the model of {type(self._pipe).__name__} was taught no scale "
                "of guidance; give guidance="
            )
        each = torch.as_tensor(scale, dtype=torch.float32).flatten().expand(len(x))
        return (each * factor).repeat(groups)


@contextmanager
def _named(pipe: Any, denoiser: nn.Module, call: Driven) -> Iterator[None]:
    """What the pipeline calls its call, for the caches of a denoiser that keep one for each."""
    caching: Any = denoiser
    if not hasattr(caching, "cache_context"):
        yield
        return
    one_of_several = bool(pipelines.layout_of(pipe).sequential)
    branch = call.rows[0].branch
    name = ("cond" if branch == COND else "uncond") if one_of_several else "cond_uncond"
    with caching.cache_context(name):
        yield
