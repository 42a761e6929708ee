"""What an edit speaks about: words of a prompt, resolved to the tokens that the model attends to.

Words are found by character offsets, never by counting decoded pieces: multi-token words,
punctuation, upper case, double spaces and unicode all land on the right positions.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cached_property
from typing import Any, NamedTuple

from hookctl.address.offsets import Span, fold, piece_spans, snap
from hookctl.address.tokenizers import content_of, default_length, own_copy
from hookctl.errors import InputError, WordError

__all__ = ["PromptTokens", "Word", "WordEdit", "WordError", "changed_words"]

# A word character of a script that puts spaces between words: only those need a boundary, so that
# a Chinese or Japanese word is found inside its sentence.
_SPACED = r"[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f]"
# The edge of a word: anywhere but between two such characters.
_EDGE = rf"(?:(?<!{_SPACED})|(?!{_SPACED}))"


class Word(NamedTuple):
    """One word of a prompt: its text and span without the punctuation that clings to it.

    `tokens` are its positions in the padded sequence; `before` and `after` those of the clinging
    punctuation. A word that is nothing but punctuation ('&') keeps it.
    """

    text: str
    span: Span
    tokens: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class WordEdit(NamedTuple):
    """One change between two prompts: indices of source words, indices of target words.

    An empty `source` is an insertion, an empty `target` a deletion.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as its text encoder sees it.

    `ids` is the padded sequence [T] (beginning, words, end, padding), `offsets` [T] the character
    span of each token in `text`, (0, 0) for specials and padding. Content lies in
    `start <= position < end`; `end` is the end-of-text token, or the first position past the
    words where the tokenizer has none. `cut` is the character from which on the text did not fit,
    None if all of it did.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...]
    start: int
    end: int
    cut: int | None = None

    @classmethod
    def encode(
        cls,
        text: str,
        tokenizer: Any,
        length: int | None = None,
        within: Span | None = None,
        dropped: int = 0,
        side: str | None = None,
        cuts: bool = False,
    ) -> PromptTokens:
        """Tokenize `text` and pad it to `length`.

        Receives: the prompt, a transformers tokenizer (fast or slow), and the padded length T
        (default: the tokenizer's `model_max_length`; no padding where that is unlimited).
        within: where in `text` the prompt is, if it stands in a template, whose tokens count as
        specials then; dropped: how many positions in front fall away; side: "left" or "right",
        where the padding is put, None for where the tokenizer puts it; cuts: whether what does not
        fit is cut off, as the pipelines do, from the end of the text.
        Raises `InputError` where the prompt does not fit.
        """
        if not isinstance(text, str):
            raise InputError(f"a prompt must be one string, got {type(text).__name__}: {text!r}")
        fast = bool(getattr(tokenizer, "is_fast", False))
        coded = own_copy(tokenizer)(
            text, padding=False, truncation=False, verbose=False,
            return_special_tokens_mask=True, return_offsets_mapping=fast,
        )  # fmt: skip
        ids = [int(i) for i in coded["input_ids"]]
        start, end = content_of(ids, coded["special_tokens_mask"], tokenizer)
        if fast:
            spans = [(int(a), int(b)) for a, b in coded["offset_mapping"][start:end]]
        else:
            spans = piece_spans(text, ids[start:end], tokenizer)
        prompt, behind = text, len(ids) - end
        if within is not None:
            before, spans = _inside(spans, within)
            start, prompt = start + before, text[slice(*within)]
            end = start + len(spans)

        limit = default_length(tokenizer) if length is None else length
        limit = len(ids) if limit is None else int(limit)
        missing, cut, room = limit - len(ids), None, limit - behind - start
        if missing < 0 < room and cuts and getattr(tokenizer, "truncation_side", "") == "right":
            ids = ids[: limit - behind] + ids[len(ids) - behind :]
            cut = snap(spans[room], prompt)[0] if room < len(spans) else None
            spans, missing = spans[:room], 0
            end = start + len(spans)
        if missing < 0:
            raise InputError(
                f"the prompt has {len(ids)} tokens, specials included, and at most {limit} fit: "
                f"shorten it, or raise length if the text encoder allows: {text!r}"
            )
        pad = tokenizer.pad_token_id
        padding = [(tokenizer.eos_token_id or 0) if pad is None else pad] * missing
        side = side or getattr(tokenizer, "padding_side", "right")
        left = len(padding) if side == "left" else 0
        offsets = [(0, 0)] * limit
        offsets[left + start : left + end] = [snap(span, prompt) for span in spans]
        sequence = padding + ids if left else ids + padding
        first = left + start - dropped
        return cls(
            prompt,
            tuple(sequence[dropped:]),
            tuple(offsets[dropped:]),
            first,
            first + len(spans),
            cut,
        )

    @property
    def length(self) -> int:
        """T, the number of positions with padding."""
        return len(self.ids)

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The words, split at white space, with punctuation set apart from the word it clings to.

        'red circle, above' has the words 'red', 'circle' (with ',' in `after`) and 'above'.
        """
        found = []
        for chunk in re.finditer(r"\S+", self.text[: self.cut]):
            start, end = _strip_punctuation(self.text, *chunk.span())
            whole = self.overlapping(chunk.span())
            # A normaliser may leave punctuation only ('&amp;' -> '&'): no token may get lost.
            core = self.overlapping((start, end)) or whole
            before = tuple(p for p in whole if p < core[0])
            after = tuple(p for p in whole if p > core[-1])
            found.append(Word(self.text[start:end], (start, end), core, before, after))
        return tuple(found)

    def overlapping(self, span: Span) -> tuple[int, ...]:
        """Positions of the content tokens that share at least one character with `span`."""
        first, last = span
        return tuple(
            position
            for position in range(self.start, self.end)
            if self.offsets[position][0] < last and self.offsets[position][1] > first
        )

    def find(
        self, phrase: str | int | Sequence[int], occurrence: int | None = None
    ) -> tuple[int, ...]:
        """Token positions of a word or phrase in the padded sequence.

        Receives: a phrase, matched at word boundaries without regard to case, and to punctuation
        where it is not found as written; or token positions, which are only checked. All
        occurrences count unless `occurrence` names one (0 is the first). A token that the phrase
        covers only in part counts.
        Returns: ascending positions (given positions keep their order).
        Raises `WordError` where nothing matches, naming the prompt's words and the nearest ones.
        """
        if not isinstance(phrase, str):
            return self._checked(phrase, occurrence)
        spans = _matches(self.text, phrase)
        if not spans:
            raise WordError(self._unknown(phrase))
        if occurrence is not None:
            if not 0 <= occurrence < len(spans):
                raise WordError(
                    f"{phrase!r} occurs {len(spans)} time(s) in {self.text!r}, so occurrence must "
                    f"lie in 0..{len(spans) - 1}, got {occurrence}"
                )
            spans = [spans[occurrence]]
        positions = sorted({p for span in spans for p in self.overlapping(span)})
        if not positions and self.cut is not None and spans[0][1] > self.cut:
            raise WordError(
                f"{phrase!r} does not fit into the {self.length} tokens that the text encoder "
                f"takes, which end with {self.text[max(0, self.cut - 40) : self.cut]!r}; shorten "
                "the prompt, or say it earlier"
            )
        if not positions:
            raise WordError(f"the tokenizer leaves no token for {phrase!r} in {self.text!r}")
        return tuple(positions)

    def _checked(self, given: int | Sequence[int], occurrence: int | None) -> tuple[int, ...]:
        """Positions as given, if they are positions of this sequence."""
        if occurrence is not None:
            raise WordError("occurrence counts a phrase; token positions name themselves")
        items = given if isinstance(given, Sequence) else [given]
        try:
            positions = tuple(operator.index(item) for item in items)
        except TypeError as error:
            raise WordError(f"expected a phrase or token positions, got {given!r}") from error
        wrong = [p for p in positions if not 0 <= p < self.length]
        if wrong or not positions or any(isinstance(item, bool) for item in items):
            raise WordError(
                f"token positions must lie in 0..{self.length - 1}, got {given!r} "
                f"(the words of {self.text!r} are at {self.start}..{self.end - 1})"
            )
        return positions

    def _unknown(self, phrase: str) -> str:
        """The message for a phrase that is not there."""
        known = list(dict.fromkeys(word.text for word in self.words))
        by_folded = {fold(word)[0]: word for word in known}
        near: list[str] = []
        for part in fold(phrase)[0].split():
            near += [by_folded[m] for m in get_close_matches(part, by_folded, n=3, cutoff=0.6)]
        hint = f"; did you mean {', '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
        return f"{phrase!r} is not in the prompt {self.text!r}, whose words are {known}{hint}"


def changed_words(source: PromptTokens, target: PromptTokens) -> list[WordEdit]:
    """What was changed between two prompts, word by word and without regard to case.

    Receives: the two prompts. Returns: edits in reading order; indices point into `.words`.
    'a red ball' -> 'a blue ball' gives [WordEdit((1,), (1,))]; equal prompts give [].
    """
    before = [fold(word.text)[0] for word in source.words]
    after = [fold(word.text)[0] for word in target.words]
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    return [
        WordEdit(tuple(range(i1, i2)), tuple(range(j1, j2)))
        for kind, i1, i2, j1, j2 in matcher.get_opcodes()
        if kind != "equal"
    ]


def _inside(spans: Sequence[Span], within: Span) -> tuple[int, list[Span]]:
    """How many tokens come before a stretch of a text, and the spans in it of those that do not
    come after."""
    first, last = within
    before = sum(b <= first for _, b in spans)
    return before, [
        (max(a, first) - first, min(b, last) - first) for a, b in spans[before:] if a < last
    ]


def _strip_punctuation(text: str, start: int, end: int) -> Span:
    """The span without punctuation at its ends, or unchanged where nothing else is in it."""
    solid = [i for i in range(start, end) if not unicodedata.category(text[i]).startswith("P")]
    return (solid[0], solid[-1] + 1) if solid else (start, end)


def _matches(text: str, phrase: str) -> list[Span]:
    """Spans of the phrase in the text: as written, else with punctuation and its lack forgiven."""
    folded, origin = fold(text)
    parts = fold(phrase)[0].split()
    bare = [part[slice(*_strip_punctuation(part, 0, len(part)))] for part in parts]
    for joint, wanted in ((r"\s+", parts), (r"\W+", bare)):
        body = joint.join(map(re.escape, wanted))
        spans = [m.span() for m in re.finditer(_EDGE + body + _EDGE, folded) if body]
        if spans:
            return [(origin[a][0], origin[b - 1][1]) for a, b in spans]
    return []
