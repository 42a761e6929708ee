"""Windows of the schedule by word, and which tokens they hold for at a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.address.text import PromptText
from hookctl.arguments import refusal
from hookctl.recipes.common.prompt_texts import positions_of

WindowLike = float | tuple[float, float]


@dataclass(frozen=True)
class WordWindows:
    """A window for all tokens, and windows of their own for those of some words."""

    default: Window
    by_word: tuple[tuple[str, Window], ...] = ()

    @classmethod
    def of(cls, value: WindowLike | Mapping[str, WindowLike], name: str) -> WordWindows:
        """Read a window, or {"default": window, word: window, ...}; without default: always.

        name: of the argument. Raises InputError for what is no window.
        """
        if not isinstance(value, Mapping):
            return cls(Window.of(value, name))
        if any(not isinstance(word, str) for word in value):
            raise refusal(name, dict(value), "words as keys")
        windows = {word: Window.of(one, f"{name}[{word!r}]") for word, one in value.items()}
        return cls(windows.pop("default", Window()), tuple(windows.items()))

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word for word, _ in self.by_word)

    @property
    def windows(self) -> tuple[Window, ...]:
        return (self.default, *(window for _, window in self.by_word))

    def holding(self, clock: Clock) -> tuple[bool, ...]:
        """Which of `windows` hold at this time."""
        return tuple(_holds(window, clock) for window in self.windows)

    def alpha(self, text: PromptText, holding: tuple[bool, ...]) -> Tensor:
        """1 for the tokens whose window holds, else 0, [tokens]; later words win over earlier."""
        alpha = torch.full((text.tokens,), float(holding[0]), dtype=torch.float64)
        for word, holds in zip(self.words, holding[1:], strict=True):
            alpha[list(positions_of(text, word))] = float(holds)
        return alpha


def _holds(window: Window, clock: Clock) -> bool:
    if not clock.steps:
        return window.holds(clock)
    # The official table has one row more than there are steps.
    rows = clock.steps + 1
    return int(window.start * rows) <= clock.step < int(window.stop * rows)
