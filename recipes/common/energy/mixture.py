"""The step of a mixture of models, each with a solver of its own.

With predictions e_j of latents x_j, weights c_j whose sum is 1, and S_j the step of a solver that
has seen the predictions of model j alone, the next latents are

    sum_j c_j S_j(e_j, x_j)

A step of first order is affine in both: where all x_j are x, that is the step of the mixed
prediction, S(sum_j c_j e_j, x). A multistep solver extrapolates from the predictions that it
remembers. Those of the mixture were mixed with the weights of their own steps, so a change of the
weights would be extrapolated as if it were the model's; the histories of the single models are
mixed with the weights of now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hookctl.loop.solver import OwnSolver


@dataclass(frozen=True, eq=False)
class Part:
    """One model of a mixture in a step.

    weight: c, a number or a tensor that broadcasts to the latents; prediction, latents: e and the
    x that it is of, [images, ...].
    """

    weight: Tensor | float
    prediction: Tensor
    latents: Tensor


class MixedSteps:
    """The steps of a run, of which the pipeline takes those of the mixed prediction.

    names: of the models.
    """

    def __init__(self, scheduler: Any, names: Iterable[str]) -> None:
        self._solvers = {name: OwnSolver(scheduler) for name in names}
        self._pipeline = OwnSolver(scheduler)

    def difference(
        self,
        step: int,
        mixed: Tensor,
        latents: Tensor,
        parts: Mapping[str, Part],
        options: Mapping[str, Any],
    ) -> Tensor | None:
        """What to add to the pipeline's next latents, None for nothing. Call it once in every step.

        mixed, latents: the prediction that the pipeline steps with, and its x; parts: by the names
        of the models; options: of the pipeline's step. What other editors add to its prediction
        stays as it is.
        """
        pipeline = self._pipeline.step(mixed, step, latents, options)
        wanted = [
            part.weight * self._solvers[name].step(part.prediction, step, part.latents, options)
            for name, part in parts.items()
        ]
        other_latents = any(part.latents is not latents for part in parts.values())
        if not other_latents and not self._pipeline.remembers:
            return None
        return sum(wanted[1:], wanted[0]) - pipeline
