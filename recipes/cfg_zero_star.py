"""CFG-Zero*: guidance away from the unconditional prediction at its best scale.

Fan et al., "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models", arXiv
2503.18886. With alpha = <c, u> / <u, u> of each image, c - alpha u is orthogonal to u, and

    alpha u + g (c - alpha u),        in the first steps of the run the velocity is 0

since an underfitted model's first velocities lead further away than none at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hookctl.arguments import checked, whole
from hookctl.errors import UnsupportedError
from hookctl.loop.noise import Noise
from hookctl.loop.state import Predictions
from hookctl.recipes.common.guidance_rule import GuidanceRule, Guided, guided, inner
from hookctl.run_state import RunState


class CFGZeroStar(GuidanceRule):
    """CFG-Zero* in the place of the pipeline's guidance.

    zero_steps: for how many first steps of a run the velocity is 0, which wastes them: 0 for runs
    of a few steps. None: 1, as published, for flow matching, and 0 for other models, whose
    prediction 0 does not mean to stay.
    strength: 1 as published, 0 for the pipeline's own guidance; start, stop: a window, outside of
    which the pipeline's own guidance is left. Costs nothing.

    What Qwen-Image and Z-Image make of their sum (norms, a cap) they make of the rule's; Z-Image's
    scale s is read as g = s + 1. Raises UnsupportedError for a run without guidance, for pipelines
    that guide in another way, and for zero_steps of a model without flow matching.
    """

    _zero_steps: RunState[int] = RunState(0)

    @checked()
    def __init__(self, zero_steps: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.zero_steps = zero_steps
        if zero_steps is not None:
            whole(zero_steps, "CFGZeroStar: zero_steps")

    def attach(self, target: Any) -> None:
        scheduler = getattr(target, "scheduler", None)
        flow = scheduler is not None and _flows(scheduler)
        if self.zero_steps and not flow:
            raise UnsupportedError(
                f"CFGZeroStar: zero_steps={self.zero_steps}, but {type(scheduler).__name__} is "
                "none of flow matching, where a prediction of 0 means to stay; give zero_steps=0"
            )
        self._zero_steps = int(flow) if self.zero_steps is None else self.zero_steps

    def combine(self, predictions: Predictions) -> Tensor:
        own = predictions.own
        if predictions.state.clock.step >= self._zero_steps or self.neutral() or own is None:
            return super().combine(predictions)
        guided(self.name, predictions)  # a run without guidance is refused at once
        return predictions.guided - self.strength * own

    def term(self, step: Guided) -> Tensor:
        size = inner(step.u, step.u)
        alpha = torch.where(size > 0, inner(step.c, step.u) / size, torch.ones_like(size))
        return (1 - step.g) * (alpha - 1) * step.u


def _flows(scheduler: Any) -> bool:
    """Whether a scheduler is of flow matching."""
    try:
        return Noise(scheduler).kind == "flow_prediction"
    except UnsupportedError:  # its levels are unknown here, and no rule needs them
        return False
