"""Guidance away from a degraded prediction: what PAG and SEG share.

Beside the rows of a pipeline's own guidance the denoiser predicts a copy of the conditional ones
whose self-attention is degraded at a few sites, and the difference is followed:

    eps = eps_guided + s (eps_cond - eps_perturbed)

With classifier-free guidance eps_guided = eps_u + g (eps_c - eps_u), without it eps_c. The copy
has the text, the image and the edits of the row that it copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.rows import COND
from hookctl.address.sites import Selector, Site
from hookctl.editor import Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.branches import Branch
from hookctl.loop.state import Predictions, State


class PerturbedGuidance(Editor):
    """Base of recipes that add a perturbed branch of their own.

    scale: s; 0 adds no rows. branch: name of the branch, for two editors of one kind. sites: where
    the attention is perturbed; None: the self-attention of a UNet's middle block, or of the middle
    block of a transformer.
    """

    def __init__(
        self, scale: float, branch: str, sites: Selector, start: float, stop: float
    ) -> None:
        self.scale = number(scale, f"{self.name}: scale")
        if not branch or not isinstance(branch, str):
            raise InputError(f"{self.name}: branch={branch!r}; give the new branch a name")
        self.branch, self._sites = branch, sites
        self.sites, self.start, self.stop = sites, start, stop

    def claims(self) -> Sequence[Claim]:
        cure = "Give one of them another branch=, or windows that do not overlap"
        what = f"branch {self.branch!r}"
        return [Claim(what, None, self.window(), cure=cure)] if self.scale else []

    def attach(self, target: Any) -> None:
        every = [site for site, _ in describe_sites(denoiser_of(target))]
        self.sites = middle(every, self.name) if self._sites is None else self._sites

    def scale_at(self, clock: Clock) -> float:
        """s at this time."""
        return self.scale

    def branches(self, state: State) -> Mapping[str, Branch]:
        return {self.branch: Branch(COND)} if self.scale_at(state.clock) else {}

    def combine(self, predictions: Predictions) -> Tensor:
        guided, s = predictions.guided, self.scale_at(predictions.state.clock)
        if not s:
            return guided
        away = predictions[COND] - predictions[self.branch]
        return guided + s * away.to(guided)


def middle(sites: Sequence[Site], who: str) -> list[str]:
    """The paths of the self-attention (or joint) sites in the middle of a model."""
    mid = [site.path for site in sites if site.place == "mid" and site.kind == "self"]
    if mid:
        return mid
    image = [site for site in sites if site.kind in ("self", "joint")]
    if not image:
        raise UnsupportedError(f"{who}: this model has no self-attention")
    block = image[len(image) // 2].path.rpartition(".")[0]
    return [site.path for site in image if site.path.rpartition(".")[0] == block]


def number(value: Any, name: str, low: float = 0.0) -> float:
    """A finite number of at least `low`, or InputError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < low:
        raise InputError(f"{name}={value!r}; give a finite number of {low:g} or more")
    return float(value)
