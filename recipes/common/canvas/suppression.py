"""Guidance away from what must not appear outside of a region.

Wang et al., "Cyclic One-Way Diffusion", arXiv 2306.08247 (ICLR 2024), official code: with M the
region, and eps_suppress and eps_diverse the predictions under two further prompts,

    n = eps_uncond + (1 - M) (eps_suppress - eps_diverse),   eps = n + g (eps_cond - n)

which is the guided prediction + (1 - g) (1 - M) (eps_suppress - eps_diverse).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hookctl.editor import Editor
from hookctl.loop import prompts
from hookctl.loop.branches import Branch
from hookctl.loop.state import Predictions, State
from hookctl.run_state import RunState

BRANCHES = ("suppressed", "diverse")


class Suppression(Editor):
    """Keep a thing out of what is drawn outside of a region.

    pipe: that encodes the prompts; suppress, diverse: what must not appear, and what may instead;
    guidance: g of the run; outside: 1 - M, broadcast to the latents.

    Costs two further rows.
    """

    _texts: RunState[Tensor | None] = RunState(None)

    def __init__(
        self, pipe: Any, suppress: str, diverse: str, *, guidance: float, outside: Tensor
    ) -> None:
        self.pipe, self.prompts = pipe, [suppress, diverse]
        self.guidance, self.outside = guidance, outside

    def branches(self, state: State) -> Mapping[str, Branch]:
        if self._texts is None:
            self._texts = prompts.encode(self.pipe, self.prompts, state.encoding).sequence
        texts = zip(BRANCHES, self._texts, strict=True)
        return {name: Branch(text=text[None]) for name, text in texts}

    def combine(self, predictions: Predictions) -> Tensor:
        suppress, diverse = (predictions[name] for name in BRANCHES)
        return predictions.guided + (1 - self.guidance) * self.outside * (suppress - diverse)
