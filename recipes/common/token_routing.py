"""How the maps over text tokens of an edit are made of its source's: Prompt-to-Prompt's token map.

Hertz et al., arXiv 2208.01626: with T the map from source tokens to tokens of the edit, a flagging
aligned tokens, eq the gains of words and alpha 1 while a word is in its window,

    A' = A_source T (a alpha eq) + A_edit ((1 - a) alpha eq + (1 - alpha))

per token of the edit. Gains with a window of their own scale both parts while it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.address.text import PromptText, align
from hookctl.attention.token_map import Routing
from hookctl.recipes.common.prompt_texts import PromptTexts
from hookctl.recipes.common.word_windows import WordWindows


class TokenRouting:
    """The token maps and gains of a recipe's edits.

    texts: the source's prompt, then those of its edits; modes: "replace", "refine" or "auto" of
    each edit; windows: while a word takes the source's map; gains: of each edit's words;
    gain_window: of the gains, None for the windows of their words. paper: align tokens as the
    official code does.

    Raises AlignmentError for prompts that can't be aligned as their mode says.
    """

    def __init__(
        self,
        texts: PromptTexts,
        modes: Sequence[str],
        windows: WordWindows,
        gains: Sequence[Mapping[str, float]],
        gain_window: Window | None,
        *,
        paper: bool = False,
    ) -> None:
        self._texts, self._modes, self._windows = texts, list(modes), windows
        self._gains, self._gain_window, self._paper = list(gains), gain_window, paper
        self._alignments: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}
        self.routings: dict[Any, Routing] = {}
        for edit in range(1, len(self._modes) + 1):
            self._alignment(edit, texts.read())

    def at(self, edit: int, clock: Clock, tokens: int) -> Routing:
        """The routing of an edit at this time, for a text of so many tokens.

        It is the same object until a window begins or ends.
        """
        window, holding = self._gain_window, self._windows.holding(clock)
        gains_hold = None if window is None else window.holds(clock)
        key = (edit, tokens, self._texts.form, holding, gains_hold)
        if key not in self.routings:
            self.routings[key] = self._routing(edit, tokens, holding, gains_hold)
        return self.routings[key]

    def _routing(
        self, edit: int, tokens: int, holding: tuple[bool, ...], gains_hold: bool | None
    ) -> Routing:
        texts = self._texts.read(tokens)
        token_map, a = self._alignment(edit, texts)
        alpha = self._windows.alpha(texts[edit], holding)
        gain = torch.ones_like(alpha)
        for word, value in self._gains[edit - 1].items():
            gain[list(texts[edit].positions(word))] = float(value)
        none = torch.ones_like(gain)
        # Inside and outside of the words' windows.
        inside, outside = {None: (gain, none), True: (gain, gain), False: (none, none)}[gains_hold]
        of_source = token_map * (a * alpha * inside)
        of_edit = (1 - a) * alpha * inside + (1 - alpha) * outside
        diagonal = of_source.diagonal()
        is_diagonal = torch.equal(of_source, torch.diag(diagonal))
        return Routing(diagonal.clone() if is_diagonal else of_source, of_edit)

    def _alignment(self, edit: int, texts: list[PromptText]) -> tuple[Tensor, Tensor]:
        """T and a of an edit."""
        key = (edit, texts[0].tokens, self._texts.form)
        if key not in self._alignments:
            mode = self._modes[edit - 1]
            if mode == "auto":
                as_many = texts[0].words == texts[edit].words
                mode = "replace" if as_many else "refine"
            self._alignments[key] = align(texts[0], texts[edit], mode, paper=self._paper)
        return self._alignments[key]
