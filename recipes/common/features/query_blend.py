"""Queries drawn towards those of the same image without the edits of its attention.

Tewel et al., "ConsiStory", arXiv 2402.03286, section 3.3: q <- s q_plain + (1 - s) q. The plain
ones are of rows that are added to the call, in the place of a denoiser call of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hookctl.address.clock import Clock, Window
from hookctl.address.rows import COND, UNCOND, Row
from hookctl.attention.call import AttentionCall
from hookctl.loop.branches import Branch
from hookctl.loop.state import State
from hookctl.recipes.common.image_tokens import with_image

PLAIN = {COND: "without sharing", UNCOND: "negative without sharing"}


class QueryBlend:
    """weights: s in the first step of the window and in its last; window: of the schedule."""

    def __init__(self, weights: tuple[float, float], window: Window) -> None:
        self.weights, self.window = weights, window

    def branches(self, state: State) -> Mapping[str, Branch]:
        """The plain rows of a call."""
        if not self.window.holds(state.clock):
            return {}
        present = {row.branch for row in state.rows}
        return {name: Branch(of) for of, name in PLAIN.items() if of in present}

    @staticmethod
    def is_plain(row: Row) -> bool:
        """Whether a row is one of those."""
        return row.branch in PLAIN.values()

    def weight(self, clock: Clock) -> float:
        """s in a step."""
        first, last = self.weights
        steps = int(self.window.stop * clock.steps + 1e-9)
        return first + (last - first) * clock.step / max(1, steps - 1)

    def blend(self, call: AttentionCall, row: Row) -> None:
        """Blend the image's queries of a row, if its plain twin is in the call."""
        twins = call.rows.where(PLAIN.get(row.branch, ""), row.prompt, row.image)
        if twins:
            own, (start, stop) = call.q[row.index], call.spans.image_queries
            mixed = torch.lerp(own, call.q[twins[0].index], self.weight(call.clock))
            image = mixed[..., start:stop, :]
            call.replace(row, q=with_image(own, image, call.spans.image_queries))
