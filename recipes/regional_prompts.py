"""Regional prompts: different texts in different places of one image.

The attention-level form of MultiDiffusion's idea (Bar-Tal et al., arXiv 2302.08113), known as
regional prompter or attention couple. At every attention to the text, a query inside regions asks
their texts, and one outside asks the image's own prompt:

    out = (1 - (1 - b) sum_r m_r) Attn(q, k, v) + (1 - b) sum_r m_r Attn(q, k_r, v_r)
    m_r = a_r c_r / max(1, sum_s a_s c_s)

c_r(query) is how far the query's token lies in region r, a_r the region's weight, b the base
ratio: what the prompt of the whole image keeps inside the regions. k_r, v_r pass the model's own
projections. Outputs are mixed, not scores: one softmax over all texts would make soft and
overlapping regions compete. Self-attention stays global.

On SD3 and Flux the further texts run along with the image's own in the joint sequence: each sees
itself and the image, as in a run of its own, and Attn(q, k_r, v_r) is over the image and text r.
What these models (and SDXL) read from the pooled text stays the image's.

`paper=True` is the form of Chen et al., "Training-free Regional Prompting for Diffusion
Transformers", arXiv 2411.02395, for joint models (`attention.text_regions`): one softmax over the
texts of all regions that a token lies in, image tokens see those with which they share a region
(tokens in none see each other), and a text sees its region alone. Its base prompt is the
pipeline's. Not reproduced: a mask that is kept from one call to the next, and blocks between those
of its intervals, which see everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address import per_prompt
from hookctl.address.per_prompt import Numbers, Regions, Texts
from hookctl.address.regions import Region, bit_sets
from hookctl.address.rows import COND
from hookctl.address.sites import Grid, Selector, Site
from hookctl.arguments import checked, share
from hookctl.attention.call import AttentionCall
from hookctl.attention.division import Division
from hookctl.attention.text_regions import TextRegions
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.prompts import EncodedTexts, check_texts
from hookctl.loop.state import State
from hookctl.recipes.common.canvas.region_shares import region_shares
from hookctl.recipes.common.live_regions import LiveRegions, Place, place_of
from hookctl.recipes.common.sites import grid_of, text_sites
from hookctl.run_state import RunState

Key = tuple[int, Grid, tuple[int, ...], tuple[int, ...]]  # prompt, grid, time and image, regions


class RegionalPrompts(Editor):
    """Give regions of an image texts of their own.

    texts, regions: what and where, as many of each; a list for every prompt of the run, or a list
    of lists, one for each. A text may be embeddings [tokens, channels]; a region is a
    `hookctl.Region`, a box (x0, y0, x1, y1), a mask, or a text such as "box:0,0,0.5,1". weights:
    of the regions (default 1): below 1 a region leaves a share to the prompt, and where regions
    overlap they divide the place in this ratio. base: share of the prompt inside the regions.
    edge: width of their soft border, a fraction of the image's shorter side; 0: each token is in
    or out. paper: one softmax over all texts, and regions apart (see above); its code has base from
    0.1 to 0.3 and stop=10/24. sites: attention to the text to act in; start, stop: fractions of the
    schedule.

    No regions, or base=1, leaves a run bit for bit as it was. Raises InputError for another number
    of lists than of prompts, UnsupportedError where queries form no grid over the image.
    """

    _encoded: RunState[EncodedTexts | None] = RunState(None)
    _made: RunState[dict[Key, Division | TextRegions]] = RunState(factory=dict)
    _sites: RunState[tuple[Site, ...]] = RunState(())
    _context: RunState[dict[tuple[tuple[int, ...], ...], dict[str, Tensor]]] = RunState(
        factory=dict
    )
    _by_text: RunState[bool] = RunState(False)  # whether a text stands in a call once, for all rows

    @checked(own=("texts", "regions", "weights"))
    def __init__(
        self,
        texts: Texts,
        regions: Regions,
        *,
        weights: Numbers | None = None,
        base: float = 0.2,
        edge: float = 0.0,
        paper: bool = False,
        sites: Selector = "cross, joint",
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.texts = per_prompt.texts(texts, f"{self.name}: texts")
        label = f"{self.name}: regions"
        self.regions = per_prompt.PerPrompt[Place](regions, label, place_of, per_prompt.is_box)
        self.live = LiveRegions(self.name, self.regions.items)
        self.texts.check_lengths(self.regions)
        self.weights = None
        if weights is not None:
            self.weights = per_prompt.numbers(weights, f"{self.name}: weights")
            self.weights.check_lengths(self.regions)
        self.base = share(base, f"{self.name}: base")
        self.edge = share(edge, f"{self.name}: edge")
        self.paper, self.sites, self.start, self.stop = paper, sites, start, stop
        if paper and (edge or weights is not None):
            raise InputError(
                f"{self.name}: paper=True with edge or weights; a token is in a region or not there"
            )
        if self.live and not self.base:
            raise InputError(
                f"{self.name}: base=0 leaves nothing of the prompt where a word's region is, so "
                "that its map is lost; give base above 0"
            )
        every = dict.fromkeys(self.texts.items)
        self._places = {text: place for place, text in enumerate(every)}
        self._restart()

    def _restart(self) -> None:
        self._encoded = None
        self._made = {}
        self._context = {}

    def neutral(self) -> bool:
        return self.base >= 1 or not self.texts.longest

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        check_texts(target, self.texts.items, self.name)
        self._sites = text_sites(self.name, target, self.sites)
        self.live.attach(target)
        apart = [site.path for site in self._sites if site.kind != "joint"]
        if self.paper and apart:
            raise UnsupportedError(
                f"{self.name}: paper=True is of models that hold text and image in one sequence; "
                f"{apart[0]} attends to the text alone: leave paper out"
            )

    # -- the texts -----------------------------------------------------------------------------

    def begin(self, state: State) -> None:
        self.regions.check_prompts(state.rows)
        self._restart()
        if self.live:
            places = [self.regions[row] for row in range(len(state.prompts))]
            self.live.begin(self._sites, state, places)
        if self.base < 1 and self.texts.longest:
            self._encoded = EncodedTexts(state, self.texts.items)
            alike = self._encoded.of_one_length
            self._by_text = self.texts.shared or state.projects_texts_alone or not alike

    def context(self, state: State) -> Mapping[str, Tensor] | None:
        """Every text once, where all rows can share it; else text r of every row's prompt, for each
        r, and a prompt without it gets another's, unused."""
        asked = tuple(row.prompt for row in state.rows.where(role=COND))
        if self._encoded is None or not asked:
            return None
        prompts = tuple(row.prompt for row in state.rows)
        if (prompts, asked) not in self._context:
            if self._by_text:
                every = [(p, r) for p in asked for r in range(len(self.texts[p]))]
                found = {self._label(p, r): self._text(p, r)[None] for p, r in every}
            else:
                found = {
                    self._label(0, r): torch.stack([self._text(p, r) for p in prompts])
                    for r in range(self.texts.longest)
                }
            self._context[prompts, asked] = found
        return self._context[prompts, asked]

    def _label(self, prompt: int, r: int) -> str:
        place = self._places[self.texts[prompt][r]] if self._by_text else r
        return f"{self.name} {id(self):x} {place}"  # of this editor: there may be several

    def _text(self, prompt: int, r: int) -> Tensor:
        assert self._encoded is not None  # `context` looked
        texts = self.texts[prompt]
        return self._encoded.sequence(texts[r] if r < len(texts) else self._encoded.any)

    # -- the attention -------------------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        if self._encoded is None:
            return
        grid = grid_of(call, self.name)
        for row in call.rows.where(role=COND):
            places = self.regions[row.prompt]
            regions = [self.live.region(place, row, call.clock.step) for place in places]
            known = [r for r, region in enumerate(regions) if region is not None]
            version = (call.clock.step, row.image) if self.live else ()
            key = (row.prompt, grid, version, tuple(known))
            if known:
                if key not in self._made:
                    made = self._regions if self.paper else self._division
                    shown = [(r, region) for r, region in enumerate(regions) if region]
                    weights = None if self.weights is None else self.weights[row.prompt]
                    kept = None if weights is None else [weights[r] for r in known]
                    self._made[key] = made(row.prompt, shown, kept, grid)
                found = self._made[key]
                if isinstance(found, Division):
                    call.divide(row, found)
                else:
                    call.divide_by_regions(row, found)
            if self.live:
                whole = torch.ones(grid.tokens)
                own = found.own() if known and isinstance(found, Division) else whole
                self.live.read(call, row, places, own)

    def _division(
        self,
        prompt: int,
        shown: Sequence[tuple[int, Region]],
        weights: Sequence[float] | None,
        grid: Grid,
    ) -> Division:
        """How the queries of a prompt's images divide themselves on a grid."""
        assert self._encoded is not None  # `attention` looked
        regions = [region for _, region in shown]
        shares = region_shares(regions, grid.height, grid.width, edge=self.edge, weights=weights)
        flat = ((1 - self.base) * shares).flatten(1).repeat(1, grid.frames)
        of_texts: dict[str, Tensor] = {}
        shifts: dict[str, Tensor] = {}
        for (r, _), part in zip(shown, flat, strict=True):
            name, text = self._label(prompt, r), self.texts[prompt][r]
            of_texts[name] = part + of_texts.get(name, 0)  # a text may be in several regions
            if (shift := self._encoded.shift(text)) is not None:
                shifts[name] = shift
        return Division(of_texts, shifts)

    def _regions(
        self,
        prompt: int,
        shown: Sequence[tuple[int, Region]],
        weights: Sequence[float] | None,
        grid: Grid,
    ) -> TextRegions:
        """Which text and which other tokens each of a prompt's image tokens sees."""
        bits = bit_sets([region for _, region in shown], grid.height, grid.width)
        names = [self._label(prompt, r) for r, _ in shown]
        return TextRegions(names, bits.repeat(grid.frames), self.base)
