"""`Maps`: an editor that changes nothing and records the attention maps of words."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Selector, select
from hookctl.address.text import PromptText, TextLayout
from hookctl.attention.call import AttentionCall
from hookctl.attention.maps import MapStore
from hookctl.editor import Editor
from hookctl.errors import InputError, SelectorError, WordError
from hookctl.loop.state import State

Found = tuple[tuple[str, tuple[int, ...]], ...]  # words and their tokens


class Maps(Editor):
    """Record the maps of words while a pipeline draws; find them in `session.maps`.

        with hookctl.control(pipe, hookctl.Maps("cat")) as session:
            image = pipe("a red cat").images[0]
        session.maps["cat"].overlay(image)

    words: words or phrases; each must be in one of the prompts; none means every word of every
    prompt. sites: which cross or joint sites to read; start, stop: fractions of the schedule. A
    map is the attention that image places pay to the word in the rows that see the prompt,
    averaged over heads and summed over its tokens; edits that stand in the stack are included.
    """

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
        self.store = MapStore()

    def attach(self, target: Any) -> None:
        self._layout = TextLayout(target)
        every = [site for site, _ in describe_sites(denoiser_of(target))]
        chosen = select(every, self.sites, who=self.name)
        if chosen and not any(site.kind in ("cross", "joint") for site in chosen):
            raise SelectorError(
                f"Maps: sites={self.sites!r} are no sites where the image attends to the text; "
                "give cross or joint sites, such as 'cross up'"
            )
        self._found: dict[tuple[str, int], Found] = {}

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
        grid, site, turn = call.grid, call.site, call.clock.turn
        for row in call.rows.where(branch=COND):
            found = self._tokens(call, row)
            if not found:
                continue

            def keep(row: Row, values: Tensor, found: Found = found) -> None:
                parts = values.split([len(tokens) for _, tokens in found], -1)
                for (word, _), part in zip(found, parts, strict=True):
                    self.store.note(word, site, turn, row, part, grid)

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
