"""Guidance away from a degraded prediction: what PAG and SEG share.

Beside the rows of a pipeline's own guidance the denoiser predicts a copy of the conditional ones
whose self-attention is degraded at a few sites, and the difference is followed:

    eps = eps_guided + s (eps_cond - eps_perturbed)

With classifier-free guidance eps_guided = eps_u + g (eps_c - eps_u), without it eps_c; a pipeline's
`guidance_rescale` rescales the whole sum, as in diffusers. The copy has the text, the image and the
edits of the row that it copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import COND
from hookctl.address.sites import Selector
from hookctl.arguments import checked, number, text
from hookctl.editor import Claim, Editor
from hookctl.loop.branches import Branch
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common.added_guidance import with_added
from hookctl.recipes.common.sites import IMAGE_KINDS, image_sites, middle_sites
from hookctl.run_state import RunState


class PerturbedGuidance(Editor):
    """Base of recipes that add a perturbed branch of their own.

    scale: s; 0 adds no rows. branch: name of the branch, for two editors of one kind. sites: where
    the attention is perturbed; None: the self-attention of a UNet's middle block, or of the middle
    block of a transformer. start, stop: fractions of the schedule.
    """

    kinds: Sequence[str] = IMAGE_KINDS  # of the sites that can be perturbed
    sites: RunState[Selector] = RunState(None)

    @checked()
    def __init__(
        self,
        scale: float,
        *,
        branch: str,
        sites: Selector = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.scale = number(scale, f"{self.name}: scale", low=0)
        self.branch = text(branch, f"{self.name}: branch", "a name for the new branch")
        self.given_sites = self.sites = sites
        self.start, self.stop = start, stop

    def neutral(self) -> bool | None:
        return self.scale == 0

    def claims(self) -> Sequence[Claim]:
        cure = "Give one of them another branch=, or windows that do not overlap"
        what = f"branch {self.branch!r}"
        return [Claim(what, None, self.window(), cure=cure)] if self.scale else []

    def attach(self, target: Any) -> None:
        given = self.given_sites
        self.sites = middle_sites(self.name, target) if given is None else given
        image_sites(self.name, target, self.sites, self.kinds)

    def scale_at(self, clock: Clock) -> float:
        """s at this time."""
        return self.scale

    def branches(self, state: State) -> Mapping[str, Branch]:
        return {self.branch: Branch(COND)} if self.scale_at(state.clock) else {}

    def combine(self, predictions: Predictions) -> Tensor:
        s = self.scale_at(predictions.state.clock)
        if not s:
            return predictions.guided
        return with_added(predictions, s * (predictions[COND] - predictions[self.branch]))
