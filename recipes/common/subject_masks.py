"""Where the subject is in every image of a set, from the maps of its words.

Tewel et al., "ConsiStory", arXiv 2402.03286: the newest maps of the words, averaged over sites and
heads, cut by Otsu's threshold.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Site
from hookctl.attention.call import AttentionCall
from hookctl.loop.state import State
from hookctl.maps import map_of
from hookctl.recipes.common.features.otsu import otsu
from hookctl.recipes.common.prompt_texts import PromptTexts
from hookctl.recipes.common.sites import TEXT_KINDS, layout_resolution, sites_of
from hookctl.run_state import RunState

NEWEST = 20  # maps that count: those of the last sites that were run
Image = tuple[int, int]  # prompt and image


class SubjectMasks:
    """words: of each prompt; dropped: share of a mask's cells that is left out at random in every
    step; seed: of that."""

    _maps: RunState[dict[tuple[Image, str], deque[Tensor]]] = RunState(factory=dict, kept=True)
    _means: RunState[dict[Image, list[Tensor]]] = RunState(factory=dict, kept=True)
    _made: RunState[dict[tuple[Image, Grid], Tensor | None]] = RunState(factory=dict, kept=True)
    _now: RunState[int | None] = RunState(None)
    _resolution: RunState[Fraction | None] = RunState(None)
    _texts: RunState[PromptTexts] = RunState()
    _sites: RunState[list[Site]] = RunState()

    def __init__(self, words: Sequence[tuple[str, ...]], dropped: float, seed: int) -> None:
        self.words, self.dropped, self.seed = words, dropped, seed

    def attach(self, target: Any, prompts: Sequence[str]) -> None:
        """Find the words in the prompts; WordError for one that its prompt does not have."""
        self._sites = [site for site in sites_of(target) if site.kind in TEXT_KINDS]
        self._texts = PromptTexts(target, prompts)
        self._find(None)

    def _find(self, tokens: int | None) -> None:
        for text, words in zip(self._texts.read(tokens), self.words, strict=True):
            for word in words:
                text.find(word)

    def begin(self, who: str, state: State) -> None:
        """A new run; UnsupportedError where the grids of the sites are unknown."""
        self._find(state.own_text)
        self._maps, self._means, self._made, self._now = {}, {}, {}, None
        self._resolution = layout_resolution(who, self._sites, state.grid, "leave the recipe out")

    def read(self, call: AttentionCall) -> None:
        """Ask for the maps of this call, if its site holds the layout."""
        span = call.spans.text_keys
        if call.site.resolution != self._resolution or call.grid is None or span is None:
            return
        texts = self._texts.read(span[1] - span[0])
        for row in call.rows.where(branch=COND):
            for word in self.words[row.prompt]:
                keep = partial(self._keep, word, call.grid)
                call.read(row, texts[row.prompt].find(word), keep)

    def _keep(self, word: str, grid: Grid, row: Row, values: Tensor) -> None:
        key = ((row.prompt, row.image), word)
        # A video's frames share a mask.
        image = map_of(values.detach(), grid).mean(0)
        self._maps.setdefault(key, deque(maxlen=NEWEST)).append(image)

    def step(self, now: int | None = None) -> None:
        """A step, whose masks are of the maps before it; None for one after all.

        In the further calls of a step (guidance by two) they stay as they are.
        """
        if now is not None and now == self._now:
            return
        self._means, self._made, self._now = {}, {}, now
        for (image, _), maps in self._maps.items():
            mean = torch.stack(tuple(maps)).float().mean(0)
            self._means.setdefault(image, []).append(mean)

    def mask(self, image: Image, grid: Grid) -> Tensor | None:
        """Where the subject is, bool [tokens]; None before the first maps."""
        key = (image, grid)
        if key not in self._made:
            fine = [
                F.interpolate(mean[None, None], size=tuple(grid), mode="bilinear").flatten()
                for mean in self._means.get(image, ())
            ]
            inside = [one >= otsu(one) for one in fine]
            self._made[key] = torch.stack(inside).any(0).repeat(grid.frames) if inside else None
        return self._made[key]

    def shown(self, image: Image, grid: Grid, step: int) -> Tensor | None:
        """The mask's tokens that others look at in a step, [indices]."""
        mask = self.mask(image, grid)
        if mask is None:
            return None
        draw = random.Random(f"{self.seed} {step} {image} {grid}").getrandbits(62)
        chance = torch.rand(len(mask), generator=torch.Generator().manual_seed(draw))
        return (mask & (chance >= self.dropped).to(mask.device)).nonzero()[:, 0]
