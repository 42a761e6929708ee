"""The denoiser calls of a program, made after the pattern of the pipeline's own first one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address import families
from hookctl.address.clock import Clock
from hookctl.errors import InputError
from hookctl.loop.calls import prediction_of
from hookctl.loop.driven import Driven
from hookctl.loop.solver import Solver
from hookctl.loop.state import split_branches
from hookctl.loop.template import Template

Texts = Mapping[str, Tensor]  # branch -> embeddings [1 | images, tokens, channels]


class ProgramCalls:
    """Makes the denoiser calls of one program and tells the hooks of each whose and when it is."""

    def __init__(
        self,
        program: Any,
        denoiser: nn.Module,
        template: Template,
        solver: Solver,
        prompts: tuple[str, ...],
        images: int,
    ) -> None:
        self._program, self._denoiser, self._template = program, denoiser, template
        self._solver, self._prompts, self._images = solver, prompts, images

    def call(self, branches: tuple[str, ...], entry: int | None, first: int = 0) -> Driven:
        """A call of these branches at an entry of the schedule, None for its clean end.

        first: the level that the run starts from.
        """
        times = self._solver.timesteps
        time = float(times[entry]) if entry is not None else 0.0
        skipped = self._solver.entries[first][0]
        steps = len(times) - skipped
        step = steps - 1 if entry is None else max(0, entry - skipped)
        return Driven(
            program=self._program,
            denoiser=families.uncompiled(self._denoiser),
            prompts=self._prompts,
            images_per_prompt=self._images,
            encoding=self._template.encoding,
            rows=self._template.rows_of(branches)[0],
            clock=Clock(step, steps, time, skipped),
        )

    def predict(
        self, call: Driven, model_input: Tensor, entry: int | None, contexts: Texts | None
    ) -> dict[str, Tensor]:
        """Branch -> prediction [images, ...] of a call.

        model_input: [rows, ...]; contexts: in place of the prompts' texts. Raises InputError for
        texts of branches that the run does not have.
        """
        branches = tuple(dict.fromkeys(row.branch for row in call.rows))
        if contexts and (unknown := set(contexts) - set(self._template.branches)):
            raise InputError(
                f"contexts for {', '.join(sorted(unknown))}; this run has "
                f"{', '.join(self._template.branches)} rows"
            )
        times = self._solver.timesteps
        timestep = times[entry] if entry is not None else torch.zeros_like(times[0])
        index = self._template.rows_of(branches)[1]
        arguments = self._template.call(model_input, timestep, index, contexts)
        prediction = prediction_of(self._denoiser(**arguments))
        assert prediction is not None  # every family's denoiser returns one
        channels = self._template.latents.shape[1]
        if prediction.shape[1] == 2 * channels:  # a learned variance, which no step here takes
            prediction = prediction[:, :channels]
        return split_branches(call.rows, prediction)
