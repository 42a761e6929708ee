"""An image that is denoised beside the pipeline's own, in the same run, by a solver of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from hookctl.address.rows import COND, UNCOND, Row
from hookctl.loop.calls import predict
from hookctl.loop.model_input import with_latents
from hookctl.loop.solver import OwnSolver
from hookctl.loop.state import Predictions, State


class Companion:
    """Latents [images, ...] that start where the pipeline's are and are denoised by themselves.

    In each step call `predict` in `Editor.before`, for every denoiser call of the step, and `step`
    in `Editor.combine`. name: of the branch that its conditional rows are tagged with, so that
    what acts on the prompt's rows leaves them alone; seed: of the noise that the solver draws, if
    it draws any.
    """

    def __init__(self, name: str, state: State, seed: int = 0) -> None:
        self.name = name
        self.latents = state.latents.clone()
        self._solver = OwnSolver(state.pipe.scheduler, seed)
        self._predictions: dict[str, Tensor] = {}

    def predict(self, state: State, change: Callable[[dict[str, Any]], None]) -> None:
        """Ask the denoiser, in all branches of the pipeline's call.

        change: alters the arguments of the call, which are the pipeline's but for the latents.
        """

        def own_latents(arguments: dict[str, Any]) -> None:
            repeats = len(state.rows) // self.latents.shape[0]
            rows = self.latents.repeat(repeats, *([1] * (self.latents.dim() - 1)))
            rows = self._solver.model_input(rows, state.clock.entry)
            arguments[state.sample] = with_latents(arguments[state.sample], rows, state.denoiser)
            change(arguments)

        prediction = predict(state, [self._tagged(row) for row in state.rows], change=own_latents)
        for branch in dict.fromkeys(row.branch for row in state.rows):
            index = [row.index for row in state.rows.where(branch=branch)]
            self._predictions[branch] = prediction[index[0] : index[-1] + 1]

    def step(self, predictions: Predictions, scale: float | None) -> None:
        """One step of the solver; scale: of the guidance (`guidance_scale_of`), None without."""
        like = predictions.guided
        own = {
            name: predictions.handed(part, self.latents).to(like)
            for name, part in self._predictions.items()
        }
        guided = own[COND]
        if scale is not None:
            guided = own[UNCOND] + scale * (guided - own[UNCOND])
        step = predictions.state.clock.entry
        self.latents = self._solver.step(guided, step, self.latents, predictions.options)
        self._predictions = {}

    def _tagged(self, row: Row) -> Row:
        branch = self.name if row.branch == COND else f"{self.name} {row.branch}"
        return replace(row, branch=branch, copied=None)
