"""`Maps`: an editor that changes nothing and records the attention maps of words."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hookctl.address.rows import COND, Row
from hookctl.address.sites import Selector
from hookctl.address.text import PromptText, TextLayout
from hookctl.attention.call import AttentionCall
from hookctl.attention.maps import MapStore
from hookctl.editor import Editor
from hookctl.errors import InputError, WordError
from hookctl.loop.state import State


class Maps(Editor):
    """Record the maps of words while a pipeline draws; find them in `session.maps`.

    words: words or phrases of the prompts; none means every word of every prompt. sites: which
    cross or joint sites to read. A map is the attention that image places pay to the word, averaged
    over heads, summed over its tokens; edits that stand in the stack are included.
    """

    def __init__(
        self,
        *words: str,
        sites: Selector = "cross, joint",
        start: float = 0.0,
        stop: float = 1.0,
        branch: str = COND,
    ) -> None:
        if any(not isinstance(word, str) or not word.strip() for word in words):
            raise InputError(f"Maps: words={words!r}; give words or phrases of the prompt")
        self.words, self.sites, self.branch = words, sites, branch
        self.start, self.stop = start, stop
        self.window()
        self.store = MapStore()

    def attach(self, target: Any) -> None:
        self._layout = TextLayout(target)
        self._read: dict[tuple[str, int], tuple[tuple[str, tuple[int, ...]], ...]] = {}

    def begin(self, state: State) -> None:
        self._read = {}
        self.store = state.maps
        if not state.prompts:
            raise InputError(
                "Maps: the pipeline was called without text prompts, so words can't be found"
            )
        texts = [self._layout.read(prompt) for prompt in state.prompts]
        for word in self.words:
            if not any(_has(text, word) for text in texts):
                texts[0].find(word)  # raises the error that lists the words

    def attention(self, call: AttentionCall) -> None:
        if call.site.kind not in ("cross", "joint") or call.grid is None:
            return
        for row in call.rows.where(branch=self.branch):
            found = self._tokens(call, row)
            if found:
                self.read(call, row, found)

    def read(
        self, call: AttentionCall, row: Row, found: tuple[tuple[str, tuple[int, ...]], ...]
    ) -> None:
        """Ask for all words of a row at once and keep each one's share."""
        positions = tuple(p for _, tokens in found for p in tokens)
        grid, site, turn = call.grid, call.site, call.clock.turn
        assert grid is not None  # checked by the caller

        def keep(row: Row, values: Tensor) -> None:
            place = 0
            for word, tokens in found:
                part = values[..., place : place + len(tokens)]
                self.store.note(word, site, turn, row, part, grid)
                place += len(tokens)

        call.read(row, positions, keep)

    def _tokens(self, call: AttentionCall, row: Row) -> tuple[tuple[str, tuple[int, ...]], ...]:
        start, stop = call.spans.text_keys or (0, 0)
        prompt = call.prompts[row.prompt] if row.prompt < len(call.prompts) else None
        if prompt is None:
            return ()
        key = (prompt, stop - start)
        if key not in self._read:
            text = self._layout.read(prompt, stop - start)
            words = self.words or tuple(
                dict.fromkeys(w.text for _, t in text.streams[:1] for w in t.words)
            )
            self._read[key] = tuple((word, text.find(word)) for word in words if _has(text, word))
        return self._read[key]


def _has(text: PromptText, word: str) -> bool:
    try:
        return bool(text.find(word))
    except WordError:
        return False
