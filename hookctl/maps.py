"""Attention maps: by word, step, site and grid, averaged over heads.

Maps are read out of the finished terms (edits included) as extra value columns; probabilities are
never kept. A map is a share of attention: at a cross-attention site the values of all text tokens
at one place sum to 1 (unless an edit rescaled them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.families import sites_of
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Selector, Site, select
from hookctl.address.text import PromptText, TextLayout
from hookctl.attention.call import AttentionCall
from hookctl.editor import Editor
from hookctl.errors import InputError, SelectorError, WordError
from hookctl.inspect import notebook, show
from hookctl.loop.state import State
from hookctl.run_state import RunState

SHOWN = 12  # words, of a store in a notebook


@dataclass(frozen=True, eq=False)
class MapRecord:
    """The map of a word at one site and step, for one image.

    prompt: index of the prompt; image: which of that prompt's images; map: [frames, height, width],
    averaged over heads and summed over the word's tokens.
    """

    word: str
    site: Site
    step: int
    prompt: int
    image: int
    map: Tensor = field(repr=False)


@dataclass(eq=False, repr=False)
class MapStore:
    """Every map that was read in a run, by word: `store["cat"]` is its `WordMaps`.

    words: those that were read; records: each map by itself.
    """

    records: list[MapRecord] = field(default_factory=list)
    _seen: set[tuple[str, str, int, int, int]] = field(default_factory=set)

    def clear(self) -> None:
        self.records, self._seen = [], set()

    def note(self, word: str, site: Site, step: int, row: Row, values: Tensor, grid: Grid) -> None:
        """Keep a read-out: values [sub-batch, N, tokens], with its graph if it has one.

        Two editors may read one word at one site: the map is kept once, or means would lean to it.
        """
        key = (word, site.path, step, row.prompt, row.image)
        if key in self._seen:
            return
        self._seen.add(key)
        image = values.sum(-1)
        image = image.reshape(-1, grid.height, grid.width)
        self.records.append(MapRecord(word, site, step, row.prompt, row.image, image))

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record.word for record in self.records))

    def __repr__(self) -> str:
        return f"<MapStore: {_count(len(self.words), 'word')}, {_extent(self.records)}>"

    def _repr_html_(self) -> str:
        """The mean map of each word, side by side."""
        shown = self.words[:SHOWN]
        if not shown:
            return notebook.html_lines([repr(self)])
        heat = [show.heatmap(self[word].mean().detach().cpu(), (128, 128)) for word in shown]
        strip = show.grid([heat], column_titles=shown, cell=(128, 128))
        return notebook.html_lines([repr(self)]) + notebook.html_image(strip, ", ".join(shown))

    def __contains__(self, word: object) -> bool:
        return any(record.word == word for record in self.records)

    def __getitem__(self, word: str) -> WordMaps:
        chosen = [record for record in self.records if record.word == word]
        if not chosen:
            raise WordError(
                f"no map of {word!r} was recorded; recorded are: "
                f"{', '.join(map(repr, self.words)) or 'none'}. Add hookctl.Maps({word!r}) to "
                "the editors"
            )
        return WordMaps(word, chosen)


@dataclass(frozen=True, eq=False, repr=False)
class WordMaps:
    """The maps of one word; narrow them by prompt, image, step, site or grid, then average."""

    word: str
    records: Sequence[MapRecord]

    @property
    def prompts(self) -> tuple[int, ...]:
        return tuple(sorted({r.prompt for r in self.records}))

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({r.step for r in self.records}))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted({(r.map.shape[-2], r.map.shape[-1]) for r in self.records}))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.site.path for r in self.records))

    def __repr__(self) -> str:
        grids = ", ".join(f"{height}x{width}" for height, width in self.grids)
        prompts = _count(len(self.prompts), "prompt")
        return f"<WordMaps {self.word!r}: {prompts}, {_extent(self.records)}, grids {grids}>"

    def _repr_html_(self) -> str:
        """The mean map."""
        heat = show.heatmap(self.mean().detach().cpu())
        return notebook.html_lines([repr(self)]) + notebook.html_image(heat, self.word)

    def where(
        self,
        *,
        prompt: int | None = None,
        image: int | None = None,
        steps: Iterable[int] | None = None,
        site: str | None = None,
        grid: tuple[int, int] | None = None,
    ) -> WordMaps:
        """The records that match; InputError if none does."""
        wanted = None if steps is None else set(steps)
        chosen = [
            r
            for r in self.records
            if (prompt is None or r.prompt == prompt)
            and (image is None or r.image == image)
            and (wanted is None or r.step in wanted)
            and (site is None or r.site.path == site)
            and (grid is None or tuple(r.map.shape[-2:]) == tuple(grid))
        ]
        if not chosen:
            raise InputError(
                f"no map of {self.word!r} with prompt={prompt}, image={image}, steps={steps}, "
                f"site={site!r}, grid={grid}; there are prompts {self.prompts}, steps "
                f"{self.steps[:3]}..., grids {self.grids}"
            )
        return WordMaps(self.word, chosen)

    def mean(self, size: tuple[int, int] | None = None) -> Tensor:
        """Average over everything left, [height, width], on the finest grid or on `size`.

        Unless narrowed, the last prompt that holds the word and its first image are meant.
        """
        prompt = self.prompts[-1]
        image = min(r.image for r in self.records if r.prompt == prompt)
        chosen = [r for r in self.records if r.prompt == prompt and r.image == image]
        target = size or max((tuple(r.map.shape[-2:]) for r in chosen), key=lambda s: s[0] * s[1])
        by_grid: dict[Any, list[Tensor]] = {}
        for record in chosen:
            by_grid.setdefault(record.map.shape[-2:], []).append(record.map.float().mean(0))
        total, count = None, 0
        for maps in by_grid.values():
            mean = torch.stack(maps).sum(0)
            mean = F.interpolate(mean[None, None], size=target, mode="bilinear")[0, 0]
            total = mean if total is None else total + mean
            count += len(maps)
        assert total is not None  # where() and the store never leave an empty selection
        return total / count

    def overlay(self, image: Any, **options: Any) -> Any:
        """The image with the mean map laid over it (`show.overlay`)."""
        return show.overlay(image, self.mean().detach().cpu(), **options)

    def strip(self, image: Any = None, count: int = 8) -> Any:
        """One image of the map at up to `count` steps (`show.time_strip`)."""
        steps = self.steps
        step = max(1, -(-len(steps) // count))
        chosen = list(steps[::step])
        maps = [self.where(steps=[step]).mean().detach().cpu() for step in chosen]
        return show.time_strip(maps, [f"step {step}" for step in chosen], image)


def _extent(records: Sequence[MapRecord]) -> str:
    steps, sites = {r.step for r in records}, {r.site.path for r in records}
    return f"{_count(len(steps), 'step')}, {_count(len(sites), 'site')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


Found = tuple[tuple[str, tuple[int, ...]], ...]  # words and their tokens


class Maps(Editor):
    """Read the maps of words while a pipeline draws; find them in `session.maps`.

        with hookctl.control(pipe, hookctl.Maps("cat")) as session:
            image = pipe("a red cat").images[0]
        session.maps["cat"].overlay(image)

    words: words or phrases; each must be in one of the prompts; none means every word of every
    prompt. sites: which cross or joint sites to read; start, stop: fractions of the schedule. A
    map is the attention that image places pay to the word in the rows that see the prompt,
    averaged over heads and summed over its tokens; edits that stand in the stack are included.
    """

    store: RunState[MapStore] = RunState(factory=MapStore)
    _layout: RunState[TextLayout] = RunState()
    _found: RunState[dict[tuple[str, int], Found]] = RunState()

    def __init__(
        self,
        *words: str,
        sites: Selector = "cross, joint",
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        if any(not isinstance(word, str) or not word.strip() for word in words):
            raise InputError(f"Maps: words={words!r}; give words or phrases of the prompt")
        self.words = tuple(dict.fromkeys(words))
        self.sites, self.start, self.stop = sites, start, stop
        self.window()

    def attach(self, target: Any) -> None:
        self._layout = TextLayout(target)
        chosen = select(sites_of(target), self.sites, who=self.name)
        if chosen and not any(site.kind in ("cross", "joint") for site in chosen):
            raise SelectorError(
                f"Maps: sites={self.sites!r} are no sites where the image attends to the text; "
                "give cross or joint sites, such as 'cross up'"
            )
        self._found = {}

    def begin(self, state: State) -> None:
        self._found = {}
        self.store = state.maps
        if not state.prompts:
            raise InputError(
                "Maps: the pipeline was called without text prompts (with embeddings?), so words "
                "can't be found; call it with prompt="
            )
        texts = [self._layout.read(prompt, state.own_text) for prompt in state.prompts]
        for word in self.words:
            if not any(_has(text, word) for text in texts):
                texts[0].find(word)  # raises the error that lists the words

    def attention(self, call: AttentionCall) -> None:
        if call.site.kind not in ("cross", "joint") or call.grid is None:
            return
        grid, site, step = call.grid, call.site, call.clock.step
        for row in call.rows.where(branch=COND):
            found = self._tokens(call, row)
            if not found:
                continue

            def keep(row: Row, values: Tensor, found: Found = found) -> None:
                parts = values.split([len(tokens) for _, tokens in found], -1)
                for (word, _), part in zip(found, parts, strict=True):
                    self.store.note(word, site, step, row, part, grid)

            # All words of a row at once: one read-out.
            call.read(row, [p for _, tokens in found for p in tokens], keep)

    def _tokens(self, call: AttentionCall, row: Row) -> Found:
        if call.spans.text_keys is None or row.prompt >= len(call.prompts):
            return ()
        start, stop = call.spans.text_keys
        key = (call.prompts[row.prompt], stop - start)
        if key not in self._found:
            text = self._layout.read(*key)
            words = self.words or dict.fromkeys(
                word.text for _, prompt in text.streams for word in prompt.words
            )
            self._found[key] = tuple((word, text.find(word)) for word in words if _has(text, word))
        return self._found[key]


def _has(text: PromptText, word: str) -> bool:
    try:
        return bool(text.find(word))
    except WordError:
        return False
