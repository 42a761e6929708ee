"""Plain surfaces of one colour, as latents at the noise level of a step.

Bar-Tal et al., "MultiDiffusion", arXiv 2302.08113, section 4.2 "Bootstrapping": what is drawn
beside a plain surface has to find room in its own region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hookctl.arguments import Colour
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.images import encode
from hookctl.loop.noise import Noise, level_of
from hookctl.loop.packing import side_of_token
from hookctl.loop.state import State
from hookctl.recipes.common.canvas.tiles import Tile
from hookctl.recipes.common.canvas.token_canvas import as_canvas
from hookctl.run_state import RunState

OFFICIAL_COLOURS = 20


def plain_latents(pipe: Any, colour: Sequence[int], height: int, width: int) -> Tensor:
    """The latents of a plain image, [1, channels, height, width] for a size in cells, or tokens
    where the pipeline packs them."""
    factor = side_of_token(pipe) if hasattr(pipe, "_pack_latents") else pipe.vae_scale_factor
    size = (width * factor, height * factor)
    red, green, blue = colour
    latents = encode(pipe, Image.new("RGB", size, (red, green, blue)))
    return as_canvas(latents, height, width) if latents.dim() == 3 else latents


def unit_noise_of(state: State) -> Tensor:
    """The noise that a run starts from, at standard deviation 1; read before its first step."""
    return state.latents / float(getattr(state.pipe.scheduler, "init_noise_sigma", 1.0))


class Bootstrapping:
    """What MultiDiffusion's regions see outside of themselves: a random plain colour at every step,
    the same for all images and in all calls of the step.

    seed: of the colours and of their order.
    """

    _generator: RunState[torch.Generator] = RunState()
    _colours: RunState[list[list[int]]] = RunState()
    _encoded: RunState[dict[tuple[int, int, int], Tensor]] = RunState()
    _eps: RunState[Tensor] = RunState()
    _step: RunState[int] = RunState(-1)
    _chosen: RunState[dict[tuple[Tile, int], int]] = RunState(factory=dict)  # in this step

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @staticmethod
    def check(target: Any) -> None:
        """Raise InputError or UnsupportedError unless colours can be encoded and diffused."""
        if getattr(target, "vae", None) is None or getattr(target, "scheduler", None) is None:
            raise InputError(
                "MultiDiffusion: bootstrap needs the pipeline's autoencoder and scheduler; control "
                "the pipeline, or give bootstrap=0"
            )
        Noise(target.scheduler)

    def begin(self, state: State) -> None:
        """A run starts from the latents of `state`."""
        self._generator = torch.Generator().manual_seed(self.seed)
        shape = (OFFICIAL_COLOURS, 3)
        self._colours = torch.randint(0, 256, shape, generator=self._generator).tolist()
        self._encoded, self._step = {}, -1
        noise = unit_noise_of(state)  # colours are diffused with the run's own
        self._eps = as_canvas(noise, *state.grid[-2:]) if noise.dim() == 3 else noise

    def outside(self, state: State, tile: Tile, region: int) -> Tensor:
        """A plain colour at the level of the step, [images, channels, height, width] of a tile."""
        if state.clock.step != self._step:
            self._step, self._chosen = state.clock.step, {}
        if (tile, region) not in self._chosen:
            drawn = torch.randint(0, OFFICIAL_COLOURS, (1,), generator=self._generator)
            self._chosen[tile, region] = int(drawn)
        eps = tile.cut(self._eps)
        colour = self._colour(state.pipe, self._chosen[tile, region], tile)
        return level_of(state).mix(colour.to(eps).expand_as(eps), eps)

    def _colour(self, pipe: Any, index: int, tile: Tile) -> Tensor:
        key = (index, tile.height, tile.width)
        if key not in self._encoded:
            colour = self._colours[index]
            self._encoded[key] = plain_latents(pipe, colour, tile.height, tile.width)
        return self._encoded[key]


class Surface:
    """A plain colour for each prompt, diffused with the run's own noise.

    who: the recipe, for errors; colours: one for all prompts, or one for each. Raises InputError
    for another number of colours, UnsupportedError for latents that are not [images, channels,
    height, width].
    """

    def __init__(self, who: str, state: State, colours: Sequence[Colour]) -> None:
        latents, prompts = state.latents, len({row.prompt for row in state.rows})
        if len(colours) not in (1, prompts):
            raise InputError(
                f"{who}: background has {len(colours)} colours, but the pipeline draws {prompts} "
                "prompts; give one for all, or one for each"
            )
        if latents.dim() != 4:
            raise UnsupportedError(f"{who}: background is for latents [images, c, h, w]")
        x0 = [plain_latents(state.pipe, colour, *latents.shape[-2:]) for colour in colours]
        of_images = [x0[row.prompt if len(x0) > 1 else 0] for row in state.images]
        self._x0, self._eps = torch.cat(of_images).to(latents), unit_noise_of(state)

    def at(self, state: State) -> Tensor:
        """The surface at the noise level of a step, [images, channels, height, width]."""
        return level_of(state).mix(self._x0, self._eps)
