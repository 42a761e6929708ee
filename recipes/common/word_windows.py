"""Windows of the schedule by word, and which tokens they hold for at a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.address.text import PromptText
from hookctl.arguments import refusal

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
        # The official table has one row more than there are steps.
        return tuple(holds_officially(window, clock, clock.steps + 1) for window in self.windows)

    def alpha(self, text: PromptText, holding: tuple[bool, ...]) -> Tensor:
        """1 for the tokens whose window holds, else 0, [tokens]; later words win over earlier."""
        alpha = torch.full((text.tokens,), float(holding[0]), dtype=torch.float64)
        for word, holds in zip(self.words, holding[1:], strict=True):
            alpha[list(text.positions(word))] = float(holds)
        return alpha


def holds_officially(window: Window, clock: Clock, rows: int) -> bool:
    """Whether a window of a table of rows, one for each step, holds as the official code has it:
    its ends are rounded down as they come, so that 0.29 of 100 is 28 (0.29 * 100 is 28.999...)."""
    if not clock.steps:
        return window.holds(clock)
    return int(window.start * rows) <= clock.step < int(window.stop * rows)
