"""The prompts of a recipe as tokens, in the number of tokens that a call has of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookctl.address.families import image_lengths
from hookctl.address.text import PromptText, TextLayout
from hookctl.errors import WordError


class PromptTexts:
    """Prompts as a pipeline's text encoders read them.

    Raises UnsupportedError for a pipeline without a tokenizer.
    """

    def __init__(self, target: Any, prompts: Sequence[str]) -> None:
        self._layout, self._prompts, self._target = TextLayout(target), list(prompts), target
        self._texts: dict[Any, list[PromptText]] = {}

    def read(self, tokens: int | None = None) -> list[PromptText]:
        """The prompts in a text of so many tokens, by default as many as the encoder has.

        All are of one length, that of the longest where the encoder has no length of its own.
        """
        key = tokens, image_lengths(self._target)
        if key not in self._texts:
            texts = [self._layout.read(prompt, tokens) for prompt in self._prompts]
            longest = max(text.tokens for text in texts)
            if any(text.tokens < longest for text in texts):
                texts = [self._layout.read(prompt, longest) for prompt in self._prompts]
            self._texts[key] = texts
        return self._texts[key]


def require_word(word: str, texts: Sequence[PromptText], name: str) -> None:
    """Raise WordError unless one of the prompts has the word; name: of the argument."""
    if any(text.positions(word) for text in texts):
        return
    try:
        texts[0].find(word)
    except WordError as error:
        raise WordError(f"{name}: {error}") from None
