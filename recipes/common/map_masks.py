"""Where the thing is, in the source and in an edit: masks given, or from the maps of words.

Cao et al., "MasaCtrl", arXiv 2304.08465, section 3.3 "Mask-guided mutual self-attention". With
masks, the foreground of an edit looks into the source's foreground only, and background into
background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.latent import finest_within
from hookctl.address.regions import Region, region_of
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Site
from hookctl.address.text import PromptText
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.state import State


class Masks(Protocol):
    """Something that tells foreground from background."""

    def pair(self, prompt: int, image: int, grid: Grid, step: int) -> tuple[Tensor, Tensor] | None:
        """Where the thing is in the source and in an edit, bool [height, width] each on the CPU;
        None while it is unknown."""


class GivenMasks:
    """One mask of the source and one of each edit.

    nearest: a token belongs where its centre lies inside, else where half of it is covered.
    """

    def __init__(self, source: Any, target: Any, edits: int, *, nearest: bool = False) -> None:
        if source is None or target is None:
            raise InputError("give source_mask and target_mask, both or neither")
        many = isinstance(target, list | tuple) and not all(
            isinstance(x, int | float) for x in target
        )
        targets = list(target) if many else [target] * edits
        if len(targets) != edits:
            raise InputError(f"target_mask has {len(targets)} entries for {edits} edits")
        self.regions = [
            region_of(source, "source_mask"),
            *(region_of(one, "target_mask") for one in targets),
        ]
        self.nearest = nearest
        self._laid: dict[tuple[int, Grid], Tensor] = {}

    def pair(self, prompt: int, image: int, grid: Grid, step: int) -> tuple[Tensor, Tensor]:
        return self._on(0, grid), self._on(prompt, grid)

    def _on(self, prompt: int, grid: Grid) -> Tensor:
        key = (prompt, grid)
        if key not in self._laid:
            region: Region = self.regions[prompt]
            size = grid.height, grid.width
            if self.nearest:
                self._laid[key] = torch.from_numpy(region.outline.inside(*size))
            else:
                self._laid[key] = region.tokens(*size).reshape(size)
        return self._laid[key]


class WordMasks:
    """Masks from the cross-attention maps of a step.

    The maps of the sites that hold the layout are averaged over heads and sites, summed over the
    words' tokens and scaled to 0..1 for each image; what reaches the threshold belongs.

    words: of each prompt; threshold: 0 to 1; same_step: use no map of an earlier step.
    """

    def __init__(
        self, words: Sequence[tuple[str, ...]], threshold: float, *, same_step: bool = False
    ) -> None:
        if not all(words):
            raise InputError(f"words={words!r}; every prompt needs words of its own thing")
        if isinstance(threshold, bool) or not 0 < threshold <= 1:
            raise InputError(f"threshold={threshold!r}; give a share of a map's range in 0..1")
        self.words, self.threshold, self.same_step = words, threshold, same_step
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[Any, Tensor | None] = {}
        self._step = -1

    def begin(self, sites: Iterable[Site], state: State) -> None:
        """A new run over these cross or joint sites."""
        self._sums, self._masks, self._step = {}, {}, -1
        self._resolution = finest_within(sites, state.grid) if state.grid else None
        if self._resolution is None:
            raise UnsupportedError(
                "words: this model does not tell the grid of its attention sites, so no site's "
                "maps can be laid over its tokens; give masks instead"
            )

    def read(self, call: AttentionCall, texts: Sequence[PromptText]) -> None:
        """Ask for the maps of this call, if its site holds the layout."""
        if call.site.resolution != self._resolution or call.grid is None:
            return
        for row in call.rows.where(branch=COND):
            tokens = {p for word in self.words[row.prompt] for p in texts[row.prompt].find(word)}
            call.read(row, sorted(tokens), partial(self._keep, call.clock.step, call.grid))

    def _keep(self, step: int, grid: Grid, row: Row, values: Tensor) -> None:
        if step != self._step:
            self._sums, self._step = {}, step
        # A video's frames share a mask: its tokens are told apart by place alone.
        image = values.detach().sum(-1).reshape(-1, grid.height, grid.width).mean(0)
        key = (row.prompt, row.image)
        self._sums[key] = self._sums[key] + image if key in self._sums else image
        self._masks.clear()

    def pair(self, prompt: int, image: int, grid: Grid, step: int) -> tuple[Tensor, Tensor] | None:
        if self.same_step and step != self._step:
            return None
        source, target = (self._on(p, image, grid) for p in (0, prompt))
        return None if source is None or target is None else (source, target)

    def _on(self, prompt: int, image: int, grid: Grid) -> Tensor | None:
        """None where there are no maps yet, or they are the same everywhere."""
        key = (prompt, image, grid)
        if key not in self._masks:
            self._masks[key] = self._made(*key)
        return self._masks[key]

    def _made(self, prompt: int, image: int, grid: Grid) -> Tensor | None:
        found = self._sums.get((prompt, image))
        if found is None:
            return None
        low, high = found.min(), found.max()
        if not high > low:
            return None
        mask = ((found - low) / (high - low) >= self.threshold).float()
        return F.interpolate(mask[None, None], size=(grid.height, grid.width))[0, 0].bool().cpu()


def parted(source: Tensor, target: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor] | None:
    """Region bit sets of the queries and keys of a call, int64: bit 0 is foreground, bit 1
    background, and the text of a joint site belongs to both.

    source, target: bool [height, width], of the keys and of the queries. None where queries would
    be left without keys: masks that are empty, or everything, part nothing.
    """
    if (target.any() and not source.any()) or (not target.all() and source.all()):
        return None
    frames = call.grid.frames if call.grid else 1
    spans = call.spans.image_queries, call.spans.image_keys
    bits = []
    for mask, span, size in zip(
        (target, source), spans, (call.q.shape[-2], call.k.shape[-2]), strict=True
    ):
        start, stop = span or (0, size)
        inside = torch.where(mask.flatten(), 1, 2).repeat(frames)
        bits.append(F.pad(inside, (start, size - stop), value=-1))
    return bits[0], bits[1]
