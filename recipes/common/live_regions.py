"""Regions that are where a word's map is: `word:cat`, `word:cat@0.4`, `word:references[0]`.

The maps of the word in the prompt, averaged over heads and over the sites that hold the layout, are
summed over the steps so far and scaled to 0..1 for each image; what reaches the threshold belongs.
Before the first step has made maps, nothing does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor

from hookctl.address.references import check_references, reference_index
from hookctl.address.regions import Region, region_of
from hookctl.address.rows import Row
from hookctl.address.sites import Grid, Site
from hookctl.address.text import TextLayout
from hookctl.arguments import number, refusal
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError
from hookctl.loop.state import State
from hookctl.maps import map_of
from hookctl.recipes.common.sites import layout_resolution
from hookctl.run_state import RunState

Key = tuple[int, int, str]  # prompt, image, word

MARK = "word:"
THRESHOLD = 0.4


@dataclass(frozen=True)
class WordRegion:
    """Where a word, or a reference image, is: in the image, as far as its map tells."""

    word: str
    threshold: float = THRESHOLD


Place = Region | WordRegion


def place_of(value: Any, name: str) -> Place:
    """A region, or the text of one that is where a word is; InputError that names the argument."""
    if not (isinstance(value, str) and value.strip().startswith(MARK)):
        return region_of(value, name)
    word, at, threshold = value.strip().removeprefix(MARK).rpartition("@")
    wanted = f"a word of the prompt, such as '{MARK}cat' or '{MARK}cat@0.4'"
    if not at:
        word, threshold = threshold, str(THRESHOLD)
    try:
        share = number(float(threshold), name, above=0, high=1)
    except ValueError:
        raise refusal(name, value, wanted) from None
    if not word.strip():
        raise refusal(name, value, wanted)
    return WordRegion(word.strip(), share)


class LiveRegions:
    """The regions of an editor's words, as they are known at a time of a run."""

    _sums: RunState[dict[Key, Tensor]] = RunState(factory=dict)  # of the steps before
    _now: RunState[dict[Key, Tensor]] = RunState(factory=dict)  # of this one
    _step: RunState[int] = RunState(-1)
    _resolution: RunState[Fraction | None] = RunState(None)
    _layout: RunState[TextLayout | None] = RunState(None)

    def __init__(self, who: str, places: Iterable[Place]) -> None:
        self.who = who
        words = dict.fromkeys(place.word for place in places if isinstance(place, WordRegion))
        self.references = {w: i for w in words if (i := reference_index(w)) is not None}
        self.words = [word for word in words if word not in self.references]

    def __bool__(self) -> bool:
        return bool(self.words or self.references)

    def attach(self, target: Any) -> None:
        """Raises UnsupportedError for a pipeline whose words can't be addressed."""
        if self.words:
            self._layout = TextLayout(target)

    def begin(self, sites: Iterable[Site], state: State, places: Sequence[Sequence[Place]]) -> None:
        """A new run. places: of each prompt.

        Raises WordError for a word that its prompt does not have, InputError for a reference beyond
        those given, UnsupportedError for a model whose sites' grids are unknown.
        """
        self._sums, self._now, self._step = {}, {}, -1
        self._resolution = layout_resolution(self.who, sites, state.grid, "give boxes or masks")
        model = type(state.denoiser).__name__
        check_references(self.who, self.references.values(), state.images_in_sequence, model)
        if self.words and not state.prompts:
            raise InputError(
                f"{self.who}: the pipeline was called without text prompts, so '{MARK}"
                f"{self.words[0]}' can't be found; give boxes or masks, or control(..., texts=)"
            )
        for prompt, own in zip(state.prompts, places, strict=False):
            for place in own:
                if isinstance(place, WordRegion) and place.word in self.words:
                    assert self._layout is not None  # `attach` made it
                    self._layout.read(prompt, state.own_text).find(place.word)

    def read(self, call: AttentionCall, row: Row, places: Sequence[Place], own: Tensor) -> None:
        """Ask for the maps of a row, if the site of the call holds the layout.

        own: what each query leaves to the row's own text, [N], above 0.
        """
        if call.site.resolution != self._resolution or call.grid is None:
            return
        for word in dict.fromkeys(p.word for p in places if isinstance(p, WordRegion)):
            keep = partial(self._keep, word, call.grid, own)
            if word in self.references:
                call.read_reference(row, self.references[word], keep)
            elif call.spans.text_keys is not None:
                assert self._layout is not None
                start, stop = call.spans.text_keys
                text = self._layout.read(call.prompts[row.prompt], stop - start)
                call.read(row, text.find(word), keep)

    def _keep(self, word: str, grid: Grid, own: Tensor, row: Row, values: Tensor) -> None:
        """values: [sub-batch, N, tokens], of which the queries left `own` to the text."""
        each = values.detach().float() / own.to(values.device).reshape(1, -1, 1)
        # A video's frames share a region.
        key, found = (row.prompt, row.image, word), map_of(each, grid).mean(0)
        self._now[key] = self._now[key] + found if key in self._now else found

    def region(self, place: Place, row: Row, step: int) -> Region | None:
        """The region of a row's image in a step; None while it is unknown, or the map is flat."""
        if isinstance(place, Region):
            return place
        if step != self._step:
            for key, found in self._now.items():
                self._sums[key] = self._sums[key] + found if key in self._sums else found
            self._now, self._step = {}, step
        total = self._sums.get((row.prompt, row.image, place.word))
        if total is None or not total.max() > total.min():
            return None
        scaled = (total - total.min()) / (total.max() - total.min())
        return Region.mask((scaled >= place.threshold).cpu())
