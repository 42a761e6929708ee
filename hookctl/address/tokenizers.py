"""Tokenizers: how long a text may be, and where in their output it stands."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

from hookctl.address.offsets import Span

# Tokenizers without a limit report one of about 1e30, those of language models more than any
# pipeline pads to; tables of all tokens by all tokens must not be made for that.
_NO_LIMIT = 2048
_UNLIMITED = 10**20  # transformers itself pads to no more


def default_length(tokenizer: Any) -> int | None:
    """The length that texts are padded to if nothing else is said; None for no padding."""
    limit: int = tokenizer.model_max_length
    return None if limit > _NO_LIMIT else limit


def padded_length(tokenizer: Any, text: str) -> int:
    """Tokens of a text that is padded to the tokenizer's maximum, if that is one."""
    count, limit = len(own_copy(tokenizer)(text).input_ids), tokenizer.model_max_length
    return max(count, limit) if limit < _UNLIMITED else count


_copies: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()


def own_copy(tokenizer: Any) -> Any:
    """A tokenizer for ourselves: a fast one keeps how it pads, and threads share it.

    It is asked without padding alone, so that our own threads don't race for it either.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    size, copied = _copies.get(tokenizer, (0, None))
    if copied is None or size != len(tokenizer):  # textual inversion adds tokens
        copied = copy.deepcopy(tokenizer)
        _copies[tokenizer] = len(tokenizer), copied
    return copied


def content_of(ids: list[int], special: Sequence[int], tokenizer: Any) -> Span:
    """First content position and the position past the last one, in the unpadded sequence."""
    content = [i for i, flag in enumerate(special) if not flag]
    if content:
        return content[0], content[-1] + 1
    # An empty prompt: what is left of the end token, if there is one, is the beginning.
    end = len(ids) - (bool(ids) and ids[-1] == tokenizer.eos_token_id)
    return end, end
