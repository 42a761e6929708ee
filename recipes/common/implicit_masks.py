"""Where an edit acts, read off the maps of its words and off its guidance.

Brack et al., "LEDITS++", arXiv 2311.16711, section 4.2: with A the cross-attention maps of an
edit's words, averaged over sites and heads, summed over the words and smoothed, and d its guidance,

    M1 = [A >= quantile(A, threshold)]     M2 = [|d| >= quantile(|d|, threshold)]
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.latent import over_latent
from hookctl.address.regions import RegionLike, region_of
from hookctl.address.rows import Row
from hookctl.address.sites import Grid, Site
from hookctl.address.text import PromptText
from hookctl.arguments import one_of
from hookctl.attention.call import AttentionCall
from hookctl.errors import UnsupportedError
from hookctl.loop.state import State
from hookctl.maps import MapSums, map_of
from hookctl.recipes.common.features.smoothing import blur, cut_blur_matrix
from hookctl.recipes.common.sites import layout_resolution
from hookctl.run_state import RunState

MASKS = ("both", "words", "guidance", "none")
SIGMA, LENGTH = 0.5**0.5, 3  # of the smoothing, in cells of the maps
Key = tuple[str, int, int]  # branch, prompt, image


class ImplicitMasks:
    """The masks of edits, each a branch with a text of its own, in one step after another.

    who: the recipe, for errors; masks: "both", "words" (M1), "guidance" (M2) or "none"; region:
    where edits may act at all, None for anywhere.
    """

    _step: RunState[int] = RunState(-1)
    _sums: RunState[MapSums[Key]] = RunState(factory=MapSums)
    _resolution: RunState[Fraction | None] = RunState(None)

    def __init__(self, who: str, masks: str, region: RegionLike | None) -> None:
        one_of(masks, f"{who}: masks", MASKS)
        self.who, self.words = who, masks in ("both", "words")
        self.guidance = masks in ("both", "guidance")
        self.region = None if region is None else region_of(region, f"{who}: region")

    def begin(self, sites: Sequence[Site], state: State, resolution: Any = None) -> None:
        """A new run, in which the maps of sites at a resolution count (None: that of the layout).

        Raises UnsupportedError for a model without such sites.
        """
        self._step, self._sums = -1, MapSums()
        if not self.words:
            return
        cure = "give masks='guidance'"
        if resolution is None:
            resolution = layout_resolution(self.who, sites, state.grid, cure)
        if not any(site.resolution == resolution for site in sites):
            raise UnsupportedError(
                f"{self.who}: {type(state.denoiser).__name__} has no such sites at {resolution} of "
                f"the latent, whose maps paper=True takes; leave it out, or {cure}"
            )
        self._resolution = resolution

    def read(self, call: AttentionCall, row: Row, text: PromptText) -> None:
        """Ask for the maps of a row, whose text it is, if this site holds the layout."""
        if not self.words or call.grid is None or call.site.resolution != self._resolution:
            return
        if tokens := words_of(text):
            call.read(row, tokens, partial(self._keep, call.clock.step, call.grid))

    def _keep(self, step: int, grid: Grid, row: Row, values: Tensor) -> None:
        if step != self._step:
            self._step, self._sums = step, MapSums()
        self._sums.add((row.branch, row.prompt, row.image), map_of(values.detach(), grid))

    def masked(self, d: Tensor, key: Key, threshold: float, state: State, late: bool) -> Tensor:
        """The guidance d of an edit of one image where it acts.

        d: of the axes of the run's latents, such as [channels, [frames,] height, width];
        late: whether M2 counts beside M1.
        """
        size = state.grid[-2:]
        if self.region is not None:
            share = self.region.coverage(*size).to(d)
            d = d * over_latent(share[None], d, state.axes)
        channels = state.axes.index("c") - 1
        strong = at_least(d.abs().sum(channels, keepdim=True), threshold)
        if self.words and (total := self._sums.sum(key)) is not None:
            inside = at_least(smoothed(total), threshold).to(d)
            fine = F.interpolate(inside[:, None], size=size)[:, 0]
            d = d * over_latent(fine, d, state.axes)
        return d * strong if self.guidance and (late or not self.words) else d


def smoothed(maps: Tensor) -> Tensor:
    """Maps [frames, height, width] through the published kernel."""
    height, width = maps.shape[-2:]
    if min(height, width) < LENGTH:
        return maps
    return blur(maps, *(cut_blur_matrix(side, SIGMA, LENGTH) for side in (height, width)))


def words_of(text: PromptText) -> list[int]:
    """The positions of a text's tokens but for specials and padding."""
    return [start + p for start, part in text.streams for p in range(part.start, part.end)]


def at_least(x: Tensor, threshold: float) -> Tensor:
    """Which values reach a quantile of them all."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    place = threshold * (wide.numel() - 1)
    ordered = wide.flatten().sort().values  # torch.quantile takes 2 ** 24 values at most
    low, high = ordered[int(place)], ordered[min(int(place) + 1, wide.numel() - 1)]
    return wide >= torch.lerp(low, high, place - int(place))
