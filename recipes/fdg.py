"""FDG: one guidance for coarse structure, another for detail.

Sadat et al., "Guidance in the Frequency Domain Enables High-Fidelity Sampling at Low CFG Scales",
arXiv 2506.19713. Of the Laplacian pyramids of the two predictions, level by level, finest first,

    u_l + g_l (c_l - u_l)

and the sum of the pyramid is the prediction. A pyramid is linear, so only that of c - u is built:
the sum is u + sum_l g_l P_l(c - u). Levels are made as kornia does, with the 5 x 5 binomial filter
and bilinear halving and doubling, without its padding of sides that are no powers of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hookctl.arguments import checked, refusal
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.state import State
from hookctl.recipes.common.guidance_rule import GuidanceRule, Guided
from hookctl.recipes.common.latent_masks import as_grid, of_grid

LEAST = 3  # cells of a side that the filter's reflected border takes


class FDG(GuidanceRule):
    """Frequency-decoupled guidance in the place of the pipeline's.

    scales: g_l from the finest level to the coarsest, as many as there are levels; None leaves the
        pipeline's own guidance at a level. (10, 5) is the paper's for SDXL.
    strength: 1 as published, 0 for the pipeline's own guidance; start, stop: a window, outside of
    which the pipeline's own guidance is left. Costs nothing.

    Latents of videos are taken frame by frame; packed ones (Flux, FLUX.2, Qwen-Image, LTX) in the
    grid of their tokens' cells, of which the model's arguments tell height and width. What
    Qwen-Image and Z-Image make of their sum (norms, a cap) they make of the rule's. Raises
    UnsupportedError for latents without places and for a run without guidance, InputError for
    latents too small for so many levels.
    """

    @checked()
    def __init__(self, scales: Sequence[float | None] = (10.0, 5.0), **options: Any) -> None:
        super().__init__(**options)
        if not scales:
            raise refusal("FDG: scales", scales, "a guidance for each level, such as (10, 5)")
        self.scales = tuple(scales)

    def neutral(self) -> bool:
        return super().neutral() or all(scale is None for scale in self.scales)

    def begin(self, state: State) -> None:
        if not self.neutral():
            self._grid(state, state.latents)

    def _grid(self, state: State, x: Tensor) -> Tensor:
        """[images, channels, [frames,] height, width], unpacked and channels first if need be."""
        name, shown, x = type(state.pipe).__name__, tuple(x.shape), as_grid(x, state)
        if x.dim() not in (4, 5):
            raise UnsupportedError(
                f"FDG builds pyramids of images, and the latents of {name} are "
                f"{shown}, packed or without places; it needs "
                "[images, channels, [frames,] height, width]"
            )
        if len(self.scales) > 1 and min(x.shape[-2:]) >> (len(self.scales) - 2) < LEAST:
            raise InputError(
                f"FDG: scales={self.scales}: latents of {tuple(x.shape[-2:])} are too small "
                f"for {len(self.scales)} levels; give fewer"
            )
        return x

    def term(self, step: Guided) -> Tensor:
        # A number for each image, whatever the shape.
        g = step.g.flatten()
        d = self._grid(step.state, step.d)
        g = g.reshape(-1, *[1] * (d.dim() - 1))
        weighed = [
            level * (0 if scale is None else scale - g)
            for level, scale in zip(pyramid(d, len(self.scales)), self.scales, strict=True)
        ]
        return of_grid(summed(weighed), step.state, step.d.dim())


def pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """The Laplacian pyramid of [..., height, width], finest level first, the coarsest last."""
    found = []
    for _ in range(levels - 1):
        coarse = halved(x)
        found.append(x - enlarged(coarse, x.shape[-2:]))
        x = coarse
    return [*found, x]


def summed(levels: Sequence[Tensor]) -> Tensor:
    """What has this pyramid: the inverse of `pyramid`."""
    x = levels[-1]
    for level in levels[-2::-1]:
        x = enlarged(x, level.shape[-2:]) + level
    return x


def halved(x: Tensor) -> Tensor:
    """Smoothed, then half as high and wide."""
    return _resized(_smoothed(x), tuple(side // 2 for side in x.shape[-2:]))


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """At this height and width, then smoothed."""
    return _smoothed(_resized(x, size))


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    images = x.reshape(-1, 1, *x.shape[-2:])
    found = F.interpolate(images, tuple(size), mode="bilinear", align_corners=False)
    return found.reshape(*x.shape[:-2], *size)


def _smoothed(x: Tensor) -> Tensor:
    """By the binomial filter (1, 4, 6, 4, 1) / 16 along both sides, the borders reflected."""
    row = x.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    images = F.pad(x.reshape(-1, 1, *x.shape[-2:]), [2] * 4, mode="reflect")
    return F.conv2d(images, (row[:, None] * row)[None, None]).reshape(x.shape)
