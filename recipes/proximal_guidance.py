"""Proximal guidance: guide only where the guidance is strong.

Han et al., "ProxEdit: Improving Tuning-Free Real Image Editing with Proximal Guidance",
arXiv 2306.05414 (WACV 2024). With delta = cond - uncond of an image and lambda a quantile of
|delta|,

    guided = uncond + s prox(delta),     prox soft: sign(delta) max(0, |delta| - lambda)
                                              hard: delta where |delta| > lambda, else 0

and, given the path of an inverted image, in the last part of the schedule, places where prox is
nothing are drawn towards it: x <- x - r (x - x*) after the step (inversion guidance), or, in the
step, its clean image x0 <- x0 - r (x0 - x0*) (reconstruction guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.clock import Window
from hookctl.address.rows import COND, UNCOND
from hookctl.arguments import checked, number, one_of, share, whole
from hookctl.editor import Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.noise import Noise
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common.guidance_rule import COMBINATION, COMBINATION_CURE
from hookctl.recipes.common.latent_masks import as_grid, of_grid
from hookctl.run_state import RunState

MODES = ("soft", "hard")


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What a step draws to the path: which places, and how far its clean image is from there."""

    places: Tensor
    away: Tensor | None


class ProximalGuidance(Editor):
    """Limit classifier-free guidance to its strongest places, image by image.

    quantile: of |cond - uncond|, below which guidance is off; 0 leaves all of it. threshold: a
        fixed lambda instead. mode: of prox, "soft" or "hard".
    edits_only: leave the images of prompt 0, the source, as they are (the official code of ProxEdit
        with MasaCtrl).
    path: latents of every level of an inverted image (`Inverted.path`); rate: r, how fast the
        unguided places are drawn to it, from 0 (not at all) to 1; path_start, path_stop: between
        which fractions of the schedule; dilate: cells by which the guided places grow first.
        inversion: to the path's latents after each step; reconstruction: to its clean image in each
        step.
    start, stop: fractions of the schedule.
    paper: the official code's forms: there "hard" ("l0") is the soft threshold, and "soft" ("l1")
        subtracts the threshold a second time, first above zero and then below, so that some signs
        flip; the quantile is of all images together, the source among them, and a place is a
        guided one if what is left of it is above the threshold once more.

    Raises InputError for guidance to a path that is not given, or for a path without it,
    UnsupportedError for a run without guidance.
    """

    _drawn: RunState[_Drawn | None] = RunState(None)

    @checked()
    def __init__(
        self,
        quantile: float = 0.7,
        mode: str = "soft",
        *,
        threshold: float | None = None,
        edits_only: bool = False,
        path: Sequence[Tensor] | None = None,
        rate: float = 0.1,
        path_start: float = 0.6,
        path_stop: float = 1.0,
        dilate: int = 1,
        inversion: bool | None = None,
        reconstruction: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        paper: bool = False,
    ) -> None:
        self.quantile = share(quantile, "ProximalGuidance: quantile")
        self.threshold = threshold
        if threshold is not None:
            number(threshold, "ProximalGuidance: threshold", low=0)
        self.mode = one_of(mode, "ProximalGuidance: mode", MODES)
        self.edits_only, self.path, self.paper = edits_only, path, paper
        if path is None and (inversion or reconstruction):
            raise InputError("ProximalGuidance: give path=, such as that of an inverted image")
        self.inversion = path is not None and (inversion is None or inversion)
        self.reconstruction = reconstruction
        if path is not None and not (self.inversion or reconstruction):
            raise InputError(
                "ProximalGuidance: inversion=False, reconstruction=False: nothing is drawn to the "
                "path; set one of them, or leave path= out"
            )
        self.rate = share(rate, "ProximalGuidance: rate")
        self.dilate = whole(dilate, "ProximalGuidance: dilate")
        self.path_window = Window.of(
            (path_start, path_stop), "ProximalGuidance: path_start, path_stop"
        )
        self.start, self.stop = start, stop
        self.window()

    def _limits(self) -> bool:
        everything = self.quantile == 0 if self.threshold is None else self.threshold == 0
        return not everything or (self.paper and self.path is not None)

    def claims(self) -> Sequence[Claim]:
        if not self._limits():
            return []
        return [Claim(COMBINATION, None, self.window(), cure=COMBINATION_CURE)]

    def combine(self, predictions: Predictions) -> Tensor:
        guided, state = predictions.guided, predictions.state
        if not self._limits():
            return guided
        if UNCOND not in predictions.branches:
            raise UnsupportedError(
                f"{self.name} limits guidance, but this run has none; give guidance_scale above 1"
            )
        uncond = predictions[UNCOND]
        delta = predictions[COND] - uncond
        limited_rows = [not self.edits_only or row.prompt > 0 for row in state.images]
        chosen = torch.tensor(limited_rows, device=delta.device).reshape(
            -1, *[1] * (delta.dim() - 1)
        )
        if not chosen.any():
            return guided
        limit = self._limit(delta, chosen.flatten())
        limited = torch.where(chosen, self._prox(delta, limit), delta)
        free = limited.abs() > limit if self.paper else limited != 0
        # guided = uncond + s delta, whatever s is for each image.
        factor = torch.where(delta != 0, limited / delta, torch.zeros_like(delta))
        found = torch.where(chosen, uncond + (guided - uncond) * factor, guided)
        self._drawn = None
        if self.path is not None and self.rate and self.path_window.holds(state.clock):
            self._drawn = _Drawn(self._places(free, state) & chosen, self._away(state, found))
        return found

    def _limit(self, delta: Tensor, chosen: Tensor) -> Tensor:
        """lambda of each image, [images, 1, ...]; chosen: the images that are limited, [images]."""
        fine = delta.abs().to(torch.promote_types(delta.dtype, torch.float32))
        if self.threshold is not None:
            each = fine.new_full((len(delta),), self.threshold)
        elif self.paper:
            each = fine[chosen].quantile(self.quantile).expand(len(delta))
        else:
            each = torch.stack([one.quantile(self.quantile) for one in fine])
        return each.reshape(-1, *[1] * (delta.dim() - 1)).to(delta)

    def _prox(self, delta: Tensor, limit: Tensor) -> Tensor:
        """prox of delta, [images, ...]; limit: lambda of each image."""
        shrunk = delta - delta.clamp(-limit, limit)
        if self.paper and self.mode == "soft":
            shrunk = torch.where(shrunk > 0, shrunk - limit, shrunk)
            return torch.where(shrunk < 0, shrunk + limit, shrunk)
        if self.mode == "hard" and not self.paper:
            return torch.where(shrunk != 0, delta, shrunk)
        return shrunk

    # -- towards the path ----------------------------------------------------------------------

    def _places(self, free: Tensor, state: State) -> Tensor:
        """The places that are drawn to the path, bool; free: those that are guided."""
        if not self.dilate:
            return ~free
        grid = as_grid(free.float(), state)
        if grid.dim() < 4:
            raise UnsupportedError(
                f"{self.name}: the latents of {type(state.pipe).__name__}, {tuple(free.shape)}, "
                "form no grid on which the guided cells could be widened; give dilate=0"
            )
        planes, side = grid.reshape(len(grid), -1, *grid.shape[-2:]), 2 * self.dilate + 1
        wider = F.max_pool2d(planes, side, 1, self.dilate).reshape(grid.shape)
        return of_grid(wider, state, free.dim()) == 0

    def _away(self, state: State, prediction: Tensor) -> Tensor | None:
        """How far the clean image of a step is from the path's, in the latents after the step."""
        if not self.reconstruction:
            return None
        assert self.path is not None  # or there was an error
        noise, x = Noise(state.pipe.scheduler), state.latents
        time = state.clock.timestep
        x0, _ = noise.split(x, prediction.to(x), noise.level(time))
        return noise.after(time).signal * (x0 - self.path[-1].to(x))

    def after(self, state: State) -> None:
        drawn, self._drawn = self._drawn, None
        if drawn is None or self.path is None:
            return
        x, places = state.latents, drawn.places.to(state.latents)
        if drawn.away is not None:
            x = x - self.rate * drawn.away * places
        if self.inversion:
            x = x - self.rate * (x - self.path[state.clock.entry + 1].to(x)) * places
        state.latents = x
