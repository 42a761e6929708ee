"""An editor that reads the attention maps of some words, for an energy of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hookctl.address import per_prompt
from hookctl.address.families import denoiser_of
from hookctl.address.per_prompt import PerPrompt, Regions
from hookctl.address.regions import Region
from hookctl.address.sites import Selector, Site, select
from hookctl.address.text import PromptText, TextLayout
from hookctl.arguments import checked
from hookctl.editor import WHOLE_IMAGE, WORDS, Claim
from hookctl.errors import InputError, SelectorError
from hookctl.loop.energy import Energies, MapReader, energies
from hookctl.loop.state import State
from hookctl.recipes.common.energy.box_cells import Rounding, box_cells
from hookctl.recipes.common.sites import TEXT_KINDS, layout_resolution, sites_of
from hookctl.run_state import RunState

Words = Sequence[str] | Sequence[Sequence[str]]

TEXT_SITES = ", ".join(TEXT_KINDS)


@dataclass(frozen=True, eq=False)
class Subject:
    """A word of one prompt: the columns of its tokens in the maps, and where it belongs."""

    word: str
    columns: tuple[int, ...]
    region: Region | None = None

    def mask(
        self, maps: Tensor, edges: Rounding | None = None, *, never_empty: bool = False
    ) -> Tensor:
        """Which cells of a map's grid [..., height, width, tokens] are inside: [height, width].

        edges: how the edges of boxes become whole cells (`box_cells`); None: a cell belongs that is
        half covered. never_empty: a box that edges leave without a cell keeps those that it covers
        most.
        """
        assert self.region is not None
        height, width = maps.shape[-3:-1]
        if edges is not None:
            inside = box_cells(self.region, height, width, edges)
            if inside.any() or not never_empty:
                return inside.to(maps)
        return self.region.tokens(height, width).reshape(height, width).to(maps)


class WordEnergy(MapReader):
    """An editor with an energy of the maps of some words.

    words: for every prompt of a run, or a list of them for each. A word of several tokens, or one
    that stands several times in the prompt, is all of them. sites: whose maps; by default those of
    the grids that hold the layout (`address.latent`).
    """

    reads_all_tokens = False  # the energy compares the words with all other tokens
    regions: PerPrompt[Region] | None = None
    reader: RunState[MapReader | None] = RunState(None)  # in the stack, if not this editor itself
    subjects: RunState[dict[int, list[Subject]]] = RunState(factory=dict)
    _tokens: RunState[dict[int, tuple[int, ...]]] = RunState(factory=dict)
    _paths: RunState[tuple[str, ...]] = RunState(())
    _layout: RunState[TextLayout] = RunState()
    _text_sites: RunState[list[Site]] = RunState()

    @checked()
    def __init__(self, words: Words, *, sites: Selector = None) -> None:
        self.words = per_prompt.texts(words, f"{self.name}: words")
        self.given_sites, self.sites = sites, TEXT_SITES if sites is None else sites

    def set_regions(self, regions: Regions) -> None:
        """Give every word a region; InputError unless there are as many of both."""
        self.regions = per_prompt.regions(regions, f"{self.name}: regions")
        self.regions.check_lengths(self.words)

    def claims(self) -> Sequence[Claim]:
        return [Claim(what, window=self.window(), shared=True) for what in (WHOLE_IMAGE, WORDS)]

    def attach(self, target: Any) -> None:
        if target is denoiser_of(target):
            raise InputError(f"{self.name}: a bare denoiser has no words; control the pipeline")
        self._layout = TextLayout(target)
        chosen = select(sites_of(target), self.given_sites or TEXT_SITES, who=self.name)
        self._text_sites = [site for site in chosen if site.kind in TEXT_KINDS]
        if chosen and not self._text_sites:
            raise SelectorError(
                f"{self.name}: sites={self.sites!r} are no sites where the image attends to the "
                "text; give cross or joint sites, such as 'cross up'"
            )

    def begin(self, state: State) -> None:
        """Find the words and the sites of a run."""
        if not state.prompts:
            raise InputError(
                f"{self.name}: the pipeline was called without text prompts (with embeddings?), so "
                "words can't be found; call it with prompt=, or give control(..., texts=)"
            )
        self.words.check_prompts(state.rows)
        if self.regions is not None:
            self.regions.check_prompts(state.rows)
        self.subjects, self._tokens = {}, {}
        for index, prompt in enumerate(state.prompts):
            self._find_words(index, self._layout.read(prompt, state.own_text))
        self._paths = tuple(site.path for site in self.layout_sites(state))

    def _find_words(self, prompt: int, text: PromptText) -> None:
        """Note the subjects of a prompt, and the tokens whose maps are read for it."""
        words = self.words[prompt]
        positions = [text.find(word) for word in words]
        if not positions:
            return
        tokens = tuple(sorted({token for found in positions for token in found}))
        if self.reads_all_tokens:
            tokens = competing_tokens(text)
        columns = {token: column for column, token in enumerate(tokens)}
        regions = [None] * len(words) if self.regions is None else self.regions[prompt]
        self._tokens[prompt] = tokens
        self.subjects[prompt] = [
            Subject(word, tuple(columns[token] for token in found if token in columns), region)
            for word, found, region in zip(words, positions, regions, strict=True)
        ]

    def layout_sites(self, state: State) -> Sequence[Site]:
        """The sites to read in a run."""
        if self.given_sites is not None:
            return self._text_sites
        cure = "give sites= yourself, such as 'cross up1'"
        finest = layout_resolution(self.name, self._text_sites, state.grid, cure)
        return [site for site in self._text_sites if site.resolution == finest]

    def energies_of(self, state: State, scalar: Any, **options: Any) -> Energies:
        """The energies of a call's images, by a scalar of the words' maps (`loop.energy`)."""
        return energies(
            state,
            scalar,
            reader=self.reader or self,
            sites=self._paths,
            tokens=self._tokens,
            heads=self.heads,
            **options,
        )


def competing_tokens(text: PromptText) -> tuple[int, ...]:
    """The tokens that compete for attention: all but the one that begins the text, which draws
    most of it, and the last of the padding."""
    return tuple(
        start + position
        for start, prompt in text.streams
        for position in range(prompt.start, max(prompt.end, prompt.length - 1))
    )
