"""`Maps`: the editor that reads attention maps and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from hookctl.address.families import sites_of
from hookctl.address.pipelines import is_guided
from hookctl.address.references import (
    check_references,
    reference_index,
    reference_indices,
    reference_name,
)
from hookctl.address.rows import COND, UNCOND, Row
from hookctl.address.sites import Grid, Selector, Site, select
from hookctl.address.text import PromptText, TextLayout, prompts_given
from hookctl.arguments import checked
from hookctl.attention.call import AttentionCall
from hookctl.editor import WORDS, Claim, Editor
from hookctl.errors import InputError, SelectorError, UnsupportedError
from hookctl.loop.state import State
from hookctl.maps import places
from hookctl.maps.records import IMAGE, TARGET, MapKey
from hookctl.maps.store import MapStore
from hookctl.run_state import RunState

TEXT_KINDS = ("cross", "joint")  # where the image attends to the text
IMAGE_KINDS = ("self", "joint")  # where it attends to itself
_WANTED = {
    False: ("the image attends to the text", "cross or joint sites, like 'cross up'"),
    True: ("text and image are one sequence, so that words look at the image", "joint sites"),
}

Found = tuple[tuple[str, tuple[int, ...]], ...]  # words and their tokens


class Maps(Editor):
    """Read attention maps while a pipeline draws; find them in `session.maps`.

        with hookctl.control(pipe, hookctl.Maps("cat", patches=[(0.5, 0.5)])) as session:
            image = pipe("a red cat").images[0]
        session.maps["cat"].overlay(image)
        session.maps.patch(0.5, 0.5).overlay(image)

    words: words or phrases, each of one of the prompts: the attention that image places pay to
        them, averaged over heads and summed over their tokens. "references[0]" is the first
        reference image of an edit model. Without words, tokens and patches: every word of every
        prompt.
    tokens: positions of the text sequence, specials and padding among them (`maps.token`). They
        need no prompt, so they serve runs of embeddings too.
    patches: places (y, x) of the image, in fractions of its height and width: what they attend to
        (`maps.patch`), of keys that are the image's own. Of a video each frame's patch is read, or
        their mean, where a site attends across frames.
    to: the other way round, what is looked at. "image": what words and tokens attend to in the
        image, on joint sites, where they are one sequence (`maps.word("cat", to="image")`; the mean
        over a word's tokens). "references[0]": what words, tokens and patches attend to in a
        reference image, on its own grid; alone, what the whole image does (`maps.target(0)`).
    negative: read the negative prompt's words, in the rows that see it (`maps.word("blurry",
        negative=True)`; likewise tokens and patches).
    mean: keep the running mean over steps and over sites of a grid, in place of each site's map at
        each step. None: for every word (`Maps()`), not where words are named.
    sites: which sites to read; None: cross and joint ones for words and tokens, self and joint ones
        for patches and references. start, stop: fractions of the schedule.

    Maps stay on the model's device, in its dtype (means in float32). For SDXL at 50 steps those of
    every step are 20 MB for each word and image, a running mean is 20 KB. A patch costs a line of
    scores of each head at each site, M floats, for a moment; no N x N is formed for it.
    Edits that stand in the stack are seen. Tiles (`MultiDiffusion`) have no maps: each has its own
    places. Raises InputError, before denoising, for a reference beyond those that the run has.
    """

    store: RunState[MapStore] = RunState(factory=MapStore)
    _layout: RunState[TextLayout | None] = RunState(None)
    _prompts: RunState[tuple[str, ...]] = RunState(())
    _grids: RunState[tuple[Grid, ...]] = RunState(())  # of the run's references
    _found: RunState[dict[tuple[str, int], Found]] = RunState(factory=dict)

    @checked(own=("words", "tokens", "patches", "to", "negative", "mean"))
    def __init__(
        self,
        *words: str,
        tokens: Sequence[int] = (),
        patches: Sequence[tuple[float, float]] = (),
        to: str | None = None,
        negative: bool = False,
        mean: bool | None = None,
        sites: Selector = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        if any(not isinstance(word, str) or not word.strip() for word in words):
            raise InputError(f"Maps: words={words!r}; give words or phrases of the prompt")
        for name, flag in (("negative", negative), ("mean", mean)):
            if not isinstance(flag, bool) and not (name == "mean" and flag is None):
                raise InputError(f"Maps: {name}={flag!r}; give True or False")
        self.words = tuple(word for word in dict.fromkeys(words) if reference_index(word) is None)
        self.references = reference_indices(
            [word for word in words if reference_index(word) is not None], "Maps: words"
        )
        self.tokens = places.positions(tokens)
        self.patches = places.patches(patches)
        self.to = places.looked_at(to, self.references)
        self.negative = negative
        self.mean = not words if mean is None else mean
        self._into = reference_index(self.to)
        others = bool(self.tokens or self.patches or self.references)
        self._reads_words = bool(self.words) or not (others or self._into is not None)
        self._reads_target = self._into is not None and not (self.words or others)
        of_text = self._reads_words or bool(self.tokens)
        self._kinds = ("joint",) * of_text if self.to else TEXT_KINDS * of_text
        of_image = bool(self.patches or self.references or self._reads_target)
        self._kinds_of_image = IMAGE_KINDS * of_image
        kinds = dict.fromkeys([*self._kinds, *self._kinds_of_image])
        self.sites = ", ".join(kinds) if sites is None else sites
        self.start, self.stop = start, stop
        self.window()

    @property
    def branch(self) -> str:
        """Whose rows are read."""
        return UNCOND if self.negative else COND

    def claims(self) -> Sequence[Claim]:
        if not self._reads_words or self.negative:
            return []
        return [Claim(WORDS, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        self._layout = TextLayout(target) if self._reads_words else None
        every = {site.kind for site in sites_of(target)}
        if self.to is not None and self._kinds and every.isdisjoint(self._kinds):
            raise UnsupportedError(
                f"Maps: to={self.to!r}, but this model has no sites where {_WANTED[True][0]}; "
                "leave it out, for how much each place of the image looks at a word"
            )
        kinds = {site.kind for site in select(sites_of(target), self.sites, who=self.name)}
        for needed, what, example in (
            (self._kinds, *_WANTED[self.to is not None]),
            (self._kinds_of_image, "the image attends to itself", "self or joint sites"),
        ):
            if kinds and needed and kinds.isdisjoint(needed):
                raise SelectorError(
                    f"Maps: sites={self.sites!r} are no sites where {what}; give {example}"
                )
        self._found = {}

    def begin(self, state: State) -> None:
        self._found = {}
        self._prompts = ()
        self.store = state.maps
        unguided = not state.rows.where(branch=UNCOND) and is_guided(state.pipe) is False
        if self.negative and unguided:
            raise InputError(
                "Maps: negative=True, but this run has no guidance, so no row sees the negative "
                "prompt; raise guidance_scale, or leave negative out"
            )
        asked = [*self.references, *(() if self._into is None else (self._into,))]
        model = type(state.denoiser).__name__
        self._grids = check_references(self.name, asked, state.images_in_sequence, model)
        keys: list[Any] = [*self.words, *self.tokens, *self.patches]
        keys += [*map(reference_name, self.references), *[TARGET] * self._reads_target]
        if self._reads_words:
            keys += self._read_prompts(state)
        if not self.mean:
            self.store.keep_steps(map(self._key, keys))

    def _key(self, of: Any) -> MapKey:
        image = self.to == IMAGE and isinstance(of, tuple)  # a patch looks at it in any case
        to = None if image or reference_index(of) is not None else self.to
        return MapKey(of, self.branch, to)

    def _read_prompts(self, state: State) -> list[str]:
        """Check that each word is in one of the run's texts; the words that will be read."""
        assert self._layout is not None
        if not state.prompts:
            raise InputError(
                "Maps: the pipeline was called without text prompts (with embeddings?), so words "
                "can't be found; call it with prompt=, or give tokens=, or control(..., texts=)"
            )
        self._prompts = self._negatives(state) if self.negative else state.prompts
        read = partial(self._layout.read, tokens=state.own_text, negative=self.negative)
        texts = list(map(read, self._prompts))
        for word in self.words:
            if not any(text.positions(word) for text in texts):
                texts[0].find(word)  # raises the error that lists the words
        found = [word for text in texts for word in self._words_of(text)]
        if not found:
            raise InputError(f"Maps: there are no words in {self._prompts!r}; give tokens=")
        return found

    def _negatives(self, state: State) -> tuple[str, ...]:
        """The negative prompt of each prompt."""
        given = {
            name.removeprefix("negative_"): text or ""
            for name, text in state.encoding.items()
            if name.startswith("negative_prompt") and not name.endswith("embeds")
        }
        if not given:
            raise UnsupportedError(
                f"Maps: {type(state.pipe).__name__} does not say what its negative prompt is, so "
                "its words can't be found; call it with negative_prompt= and with guidance "
                "(true_cfg_scale= above 1 where it has one), or give tokens="
            )
        found = prompts_given(state.pipe, given)
        return found if len(found) == len(state.prompts) else found[:1] * len(state.prompts)

    def attention(self, call: AttentionCall) -> None:
        wanted = (*self._kinds, *self._kinds_of_image)
        if call.site.kind not in wanted:
            return
        if call.part:
            self.store.of_parts = True
            return
        if call.grid is None:
            self.store.without_grid[call.site.path] = None
            return
        # Not the call itself: it holds its read-outs, and a circle would keep its tensors alive.
        own = _Place(call.site, call.clock.step, call.grid)
        into = own if self._into is None else own._replace(grid=self._grids[self._into])
        for row in call.rows.where(branch=self.branch):
            if call.site.kind in self._kinds:
                found: list[tuple[Any, tuple[int, ...]]] = [(t, (t,)) for t in self.tokens]
                found += self._tokens(call, row) if self._reads_words else ()
                if found:  # all words and tokens of a row at once: one read-out
                    positions = [p for _, tokens in found for p in tokens]
                    if self.to is None:
                        call.read(row, positions, partial(self._keep_text, found, own))
                    else:
                        keep = partial(self._keep_lines, found, into)
                        call.read_queries(row, positions, keep, of_text=True, reference=self._into)
            if call.site.kind in self._kinds_of_image:
                self._read_image(call, row, own, into)

    def _read_image(self, call: AttentionCall, row: Row, own: _Place, into: _Place) -> None:
        if self.patches:
            cells = [(patch, tuple(own.grid.cells(*patch))) for patch in self.patches]
            at = [n for _, places in cells for n in places]
            keep = partial(self._keep_lines, cells, into)
            call.read_queries(row, at, keep, reference=self._into)
        for index in self.references:
            found = [(reference_name(index), (0,))]
            call.read_reference(row, index, partial(self._keep_text, found, own))
        if self._reads_target:
            keep = partial(self._keep_sums, into, own.grid.tokens)
            call.marginals(row, keep, reference=self._into)

    def _keep_text(
        self, found: Sequence[tuple[Any, tuple[int, ...]]], place: _Place, row: Row, values: Tensor
    ) -> None:
        """values: [sub-batch, N, tokens of everything found]."""
        parts = values.split([len(tokens) for _, tokens in found], -1)
        for (of, _), part in zip(found, parts, strict=True):
            self._note(of, place, row, part)

    def _keep_lines(
        self, found: Sequence[tuple[Any, tuple[int, ...]]], place: _Place, row: Row, lines: Tensor
    ) -> None:
        """lines: [sub-batch, queries of everything found, image keys]."""
        parts = lines.split([len(queries) for _, queries in found], 1)
        for (of, _), part in zip(found, parts, strict=True):
            self._note(of, place, row, part.mean(1)[..., None])

    def _keep_sums(self, place: _Place, queries: int, row: Row, sums: Tensor) -> None:
        """sums: [sub-batch, keys], over so many queries."""
        self._note(TARGET, place, row, sums[..., None] / queries)

    def _note(self, of: Any, place: _Place, row: Row, values: Tensor) -> None:
        key, (site, step, grid) = self._key(of), place
        self.store.note(key, site, step, row, values, grid, mean=self.mean)

    def _tokens(self, call: AttentionCall, row: Row) -> Found:
        if call.spans.text_keys is None or row.prompt >= len(self._prompts):
            return ()
        start, stop = call.spans.text_keys
        key = (self._prompts[row.prompt], stop - start)
        if key not in self._found:
            assert self._layout is not None
            text = self._layout.read(*key, negative=self.negative)
            self._found[key] = tuple(
                (word, text.find(word)) for word in self._words_of(text) if text.positions(word)
            )
        return self._found[key]

    def _words_of(self, text: PromptText) -> Iterable[str]:
        """Those that were asked for, or every word of a text."""
        every = (word.text for _, prompt in text.streams for word in prompt.words)
        return self.words or dict.fromkeys(every)


class _Place(NamedTuple):
    """Where and when maps are read."""

    site: Site
    step: int
    grid: Grid
