"""Bootstrapping of MultiDiffusion's regions: plain colours round what a region is to draw.

Bar-Tal et al., arXiv 2302.08113, section 4.2: in the first steps a region's own path sees, outside
of the region, a random plain colour at the noise level of the step, so that what it draws has to
find room inside.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hookctl.errors import InputError
from hookctl.loop.images import encode
from hookctl.loop.noise import Noise
from hookctl.loop.state import State
from hookctl.recipes.common.tiles import Window

COLOURS = 20  # of the official code


class Bootstrapping:
    """The images outside of regions, step by step. seed: of the colours and their order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @staticmethod
    def check(target: Any) -> None:
        """Raise InputError or UnsupportedError unless colours can be encoded and diffused."""
        if getattr(target, "vae", None) is None or getattr(target, "scheduler", None) is None:
            raise InputError(
                "bootstrap: regions need the pipeline's autoencoder and scheduler for it; control "
                "the pipeline, or give bootstrap=0"
            )
        Noise(target.scheduler)

    def begin(self, state: State) -> None:
        """A run starts from the latents of `state`."""
        self._generator = torch.Generator().manual_seed(self.seed)
        self._colours = torch.randint(0, 256, (COLOURS, 3), generator=self._generator).tolist()
        self._encoded: dict[tuple[int, int, int], Tensor] = {}
        scheduler = state.pipe.scheduler
        self._noise = Noise(scheduler)
        # The colours are diffused with the run's own noise.
        self._eps = state.latents / float(getattr(scheduler, "init_noise_sigma", 1.0))

    def outside(self, state: State, window: Window) -> Tensor:
        """Plain colours at the level of the step, [images, channels, height, width]."""
        eps = window.cut(self._eps)
        chosen = torch.randint(0, COLOURS, (len(eps),), generator=self._generator).tolist()
        x0 = torch.cat([self._colour(state.pipe, c, window) for c in chosen]).to(eps)
        return self._noise.level(state.clock.timestep).mix(x0, eps)

    def _colour(self, pipe: Any, index: int, window: Window) -> Tensor:
        key = (index, window.height, window.width)
        if key not in self._encoded:
            factor = pipe.vae_scale_factor
            size = (window.width * factor, window.height * factor)
            self._encoded[key] = encode(pipe, Image.new("RGB", size, tuple(self._colours[index])))
        return self._encoded[key]
