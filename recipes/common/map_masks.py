"""Where the thing is, in the source and in an edit: masks given, or from the maps of words.

Cao et al., "MasaCtrl", arXiv 2304.08465, section 3.3 "Mask-guided mutual self-attention". With
masks, the foreground of an edit looks into the source's foreground only, and background into
background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.regions import region_of
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Site
from hookctl.address.text import PromptText
from hookctl.arguments import for_each, number, refusal
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError
from hookctl.loop.state import State
from hookctl.maps import MapSums, map_of
from hookctl.recipes.common.first_pixels import first_pixels
from hookctl.recipes.common.sites import layout_resolution
from hookctl.run_state import RunState


class Masks(Protocol):
    """Something that tells foreground from background."""

    def pair(self, prompt: int, image: int, grid: Grid, step: int) -> tuple[Tensor, Tensor] | None:
        """Where the thing is in the source and in an edit, bool [height, width] each on the CPU;
        None while it is unknown."""


class GivenMasks:
    """One mask of the source and one of each edit.

    source, target: regions, boxes or masks; target: one for all edits, or a list. edits: how many
    there are. nearest: a token belongs where its first pixel lies inside (`first_pixels`), else
    where half of it is covered. Raises InputError for one without the other, and for another number
    of targets.
    """

    _masks: RunState[dict[tuple[int, Grid], Tensor]] = RunState(factory=dict)

    def __init__(self, source: Any, target: Any, edits: int, *, nearest: bool = False) -> None:
        if source is None or target is None:
            raise InputError("MasaCtrl: give source_mask and target_mask, both or neither")
        # A list of numbers is a box.
        is_list = isinstance(target, list | tuple) and not all(
            isinstance(x, int | float) for x in target
        )
        targets = for_each(target, "MasaCtrl: target_mask", edits, "edits", is_one=not is_list)
        self.regions = [
            region_of(source, "MasaCtrl: source_mask"),
            *(region_of(one, "MasaCtrl: target_mask") for one in targets),
        ]
        self.nearest = nearest

    def pair(self, prompt: int, image: int, grid: Grid, step: int) -> tuple[Tensor, Tensor]:
        return self._mask(0, grid), self._mask(prompt, grid)

    def _mask(self, prompt: int, grid: Grid) -> Tensor:
        key = (prompt, grid)
        if key not in self._masks:
            region, size = self.regions[prompt], (grid.height, grid.width)
            if self.nearest:
                self._masks[key] = first_pixels(region, *size)
            else:
                self._masks[key] = region.tokens(*size).reshape(size)
        return self._masks[key]


class WordMasks:
    """Masks from the cross-attention maps of a step.

    The maps of the sites that hold the layout are averaged over heads and sites, summed over the
    words' tokens and scaled to 0..1 for each image; what reaches the threshold belongs.

    words: of each prompt; threshold: above 0, at most 1; same_step: use no map of an earlier step.
    """

    _step: RunState[int | None] = RunState(None)
    _sums: RunState[MapSums[tuple[int, int]]] = RunState(factory=MapSums)
    _masks: RunState[dict[tuple[int, int, Grid], Tensor | None]] = RunState(factory=dict)
    _resolution: RunState[Fraction | None] = RunState()

    def __init__(
        self, words: Sequence[tuple[str, ...]], threshold: float, *, same_step: bool = False
    ) -> None:
        if not all(words):
            raise refusal("MasaCtrl: words", words, "a word of its own thing for every prompt")
        wanted = "a share of a map's range, above 0 and at most 1"
        self.threshold = number(threshold, "MasaCtrl: threshold", above=0, high=1, wanted=wanted)
        self.words, self.same_step = words, same_step
        self._restart(-1)

    def _restart(self, step: int) -> None:
        self._step, self._sums, self._masks = step, MapSums(), {}

    def begin(self, sites: Iterable[Site], state: State) -> None:
        """A new run over these cross or joint sites.

        Raises UnsupportedError for a model whose sites' grids are unknown.
        """
        self._restart(-1)
        self._resolution = layout_resolution("words", sites, state.grid, "give masks instead")

    def read(self, call: AttentionCall, texts: Sequence[PromptText]) -> None:
        """Ask for the maps of this call, if its site holds the layout."""
        if call.site.resolution != self._resolution or call.grid is None:
            return
        for row in call.rows.where(branch=COND):
            tokens = {p for word in self.words[row.prompt] for p in texts[row.prompt].find(word)}
            call.read(row, sorted(tokens), partial(self._keep, call.clock.step, call.grid))

    def _keep(self, step: int, grid: Grid, row: Row, values: Tensor) -> None:
        if step != self._step:
            self._restart(step)
        # A video's frames share a mask: its tokens are told apart by place alone.
        self._sums.add((row.prompt, row.image), map_of(values.detach(), grid).mean(0))
        self._masks.clear()

    def pair(self, prompt: int, image: int, grid: Grid, step: int) -> tuple[Tensor, Tensor] | None:
        if self.same_step and step != self._step:
            return None
        source, target = (self._mask(p, image, grid) for p in (0, prompt))
        return None if source is None or target is None else (source, target)

    def _mask(self, prompt: int, image: int, grid: Grid) -> Tensor | None:
        """None where there are no maps yet, or they are the same everywhere."""
        key = (prompt, image, grid)
        if key not in self._masks:
            self._masks[key] = self._mask_of(self._sums.sum((prompt, image)), grid)
        return self._masks[key]

    def _mask_of(self, total: Tensor | None, grid: Grid) -> Tensor | None:
        if total is None:
            return None
        low, high = total.min(), total.max()
        if not high > low:
            return None
        mask = ((total - low) / (high - low) >= self.threshold).float()
        return F.interpolate(mask[None, None], size=(grid.height, grid.width))[0, 0].bool().cpu()


def foreground_regions(
    source: Tensor, target: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor] | None:
    """Region bit sets of the queries and keys of a call, int64 [N] and [M]: bit 0 is foreground,
    bit 1 background, and the text of a joint site belongs to both.

    source, target: bool [height, width], of the keys and of the queries. None where queries would
    be left without keys: by masks that are empty, or everything.
    """
    if (target.any() and not source.any()) or (not target.all() and source.all()):
        return None
    frames = call.grid.frames if call.grid else 1
    sides = (
        (target, call.spans.image_queries, call.q.shape[-2]),
        (source, call.spans.image_keys, call.k.shape[-2]),
    )
    bits = []
    for mask, span, tokens in sides:
        start, stop = span or (0, tokens)
        inside = torch.where(mask.flatten(), 1, 2).repeat(frames)
        bits.append(F.pad(inside, (start, tokens - stop), value=-1))
    return bits[0], bits[1]
