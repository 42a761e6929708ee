"""Proximal guidance: guide only where the guidance is strong.

Han et al., "ProxEdit: Improving Tuning-Free Real Image Editing with Proximal Guidance",
arXiv 2306.05414 (WACV 2024). With delta = cond - uncond of an image and lambda a quantile of
|delta|,

    guided = uncond + s prox(delta),     prox soft: sign(delta) max(0, |delta| - lambda)
                                              hard: delta where |delta| > lambda, else 0

and, given the path of an inverted image, latents where prox is nothing are drawn towards it:
x <- x - r (x - x*), in the last part of the schedule (inversion guidance).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.clock import Window
from hookctl.address.rows import COND, UNCOND
from hookctl.editor import Editor
from hookctl.errors import UnsupportedError
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common.arguments import one_of, share, whole
from hookctl.run_state import RunState

MODES = ("soft", "hard")


class ProximalGuidance(Editor):
    """Limit classifier-free guidance to its strongest places, image by image.

    quantile: of |cond - uncond|, below which guidance is off; 0 leaves all of it. mode: of prox,
        "soft" or "hard".
    path: latents of every level of an inverted image (`Inverted.path`); rate: r, how fast the
        unguided places are drawn to it, from 0 (not at all) to 1; path_start: from which fraction
        of the schedule on; dilate: cells by which the guided places are widened first.
    start, stop: fractions of the schedule.
    paper: the official code's forms: there "hard" ("l0") is the soft threshold, and "soft" ("l1")
        subtracts the threshold a second time, first above zero and then below, so that some signs
        flip.

    Raises UnsupportedError for a run without guidance.
    """

    _guided: RunState[Tensor | None] = RunState(None)

    def __init__(
        self,
        quantile: float = 0.7,
        mode: str = "soft",
        *,
        path: Sequence[Tensor] | None = None,
        rate: float = 0.1,
        path_start: float = 0.6,
        dilate: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        paper: bool = False,
    ) -> None:
        self.quantile = share(quantile, "ProximalGuidance: quantile")
        self.mode = one_of(mode, "ProximalGuidance: mode", MODES)
        self.path, self.paper = path, paper
        self.rate = share(rate, "ProximalGuidance: rate")
        self.dilate = whole(dilate, "ProximalGuidance: dilate")
        self.path_window = Window.of((path_start, 1.0), "ProximalGuidance: path_start")
        self.start, self.stop = start, stop
        self.window()

    def combine(self, predictions: Predictions) -> Tensor:
        guided = predictions.guided
        if self.quantile == 0:
            return guided
        if UNCOND not in predictions.branches:
            raise UnsupportedError(
                f"{self.name} limits guidance, but this run has none; give guidance_scale above 1"
            )
        uncond = predictions[UNCOND]
        delta = predictions[COND] - uncond
        limit = torch.stack([d.abs().float().quantile(self.quantile) for d in delta])
        limit = limit.reshape(-1, *[1] * (delta.dim() - 1)).to(delta)
        limited = self._prox(delta, limit)
        self._guided = limited != 0
        # guided = uncond + s delta, whatever s is for each image.
        factor = torch.where(delta != 0, limited / delta, torch.zeros_like(delta))
        return uncond + (guided - uncond) * factor

    def _prox(self, delta: Tensor, limit: Tensor) -> Tensor:
        """prox of delta, [images, ...]; limit: lambda of each image."""
        shrunk = delta - delta.clamp(-limit, limit)
        if self.paper and self.mode == "soft":
            shrunk = torch.where(shrunk > 0, shrunk - limit, shrunk)
            return torch.where(shrunk < 0, shrunk + limit, shrunk)
        if self.mode == "hard" and not self.paper:
            return torch.where(shrunk != 0, delta, shrunk)
        return shrunk

    def after(self, state: State) -> None:
        guided, self._guided = self._guided, None
        if self.path is None or self.rate == 0 or not self.path_window.holds(state.clock):
            return
        if guided is None:
            return
        x = state.latents
        target = self.path[state.clock.entry + 1].to(x)
        if self.dilate:
            side = 2 * self.dilate + 1
            guided = F.max_pool2d(guided.float(), side, 1, self.dilate) > 0
        state.latents = torch.where(guided, x, x - self.rate * (x - target))
