"""Where the characters of a text went: folding, and the spans of a slow tokenizer's pieces.

Both keep, beside each character of the result, the span of the text that it came from, so that
lower-casing, double spaces or composed accents never shift an index.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

Span = tuple[int, int]


def fold(text: str) -> tuple[str, list[Span]]:
    """Case-folded, compatibility-composed text, and the span of `text` behind each character.

    Receives: any text. Returns: the folded text and one (start, end) for each of its characters.
    """
    folded: list[str] = []
    spans: list[Span] = []
    i = 0
    while i < len(text):
        end = i + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1  # an accent belongs to the letter before it
        for character in unicodedata.normalize("NFKC", text[i:end]).casefold():
            folded.append(character)
            spans.append((i, end))
        i = end
    return "".join(folded), spans


def snap(span: Span, text: str) -> Span:
    """A token's span without the white space at its ends.

    A span of white space alone (SentencePiece's lone '▁') moves to the character that follows,
    since such a piece opens the next word.
    """
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end:
        return start, end
    while start < len(text) and text[start].isspace():
        start += 1
    start = min(start, len(text.rstrip()) - 1)
    return (start, start + 1) if start >= 0 else (0, 0)


def piece_spans(text: str, ids: Sequence[int], tokenizer: Any) -> list[Span]:
    """Spans in `text` of the content tokens of a slow tokenizer, which reports none itself.

    The pieces are spelled out and matched with the text after folding both and dropping white
    space. What still differs (an unknown piece, a repaired quotation mark) takes the span left
    over between its neighbours.

    Receives: the text, its content token ids (no specials), the tokenizer that made them.
    Returns: one (start, end) for each id.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    surface, ranges = _spell(pieces, tokenizer)
    left, left_spans = _bare(surface)
    right, right_spans = _bare(text)
    if not right:
        return [(0, 0)] * len(ranges)
    places = _places(left, right, right_spans)
    out: list[Span] = []
    for start, end in ranges:
        found = [p for p, (a, b) in zip(places, left_spans, strict=True) if a < end and b > start]
        if not found:  # a piece without letters opens the next word
            found = [p for p, (a, _) in zip(places, left_spans, strict=True) if a >= end][:1]
        found = found or [right_spans[-1]]
        out.append((min(a for a, _ in found), max(b for _, b in found)))
    return out


def _spell(pieces: Iterable[str], tokenizer: Any) -> tuple[str, list[Span]]:
    """The pieces written one after the other, and the range of each in that string."""
    decoder: dict[str, int] | None = getattr(tokenizer, "byte_decoder", None)
    unknown = getattr(tokenizer, "unk_token", None)
    data = bytearray()
    edges = [0]
    for piece in pieces:
        if piece == unknown:
            data += "\ufffd".encode()
        else:
            plain = piece.removesuffix("</w>").replace("▁", "")
            for character in plain:
                byte = None if decoder is None else decoder.get(character)
                data += character.encode() if byte is None else bytes([byte])
        edges.append(len(data))
    # A byte-level piece may hold a part of a character; both its neighbours then cover it.
    starts = [b & 0xC0 != 0x80 for b in data]
    character_of = [-1]
    for is_start in starts:
        character_of.append(character_of[-1] + is_start)
    ranges = [
        (character_of[a + 1], character_of[b] + 1) if b > a else (character_of[a] + 1,) * 2
        for a, b in pairwise(edges)
    ]
    return data.decode("utf-8", "replace"), ranges


def _bare(text: str) -> tuple[str, list[Span]]:
    """Folded text without white space, with spans."""
    folded, spans = fold(text)
    kept = [(c, s) for c, s in zip(folded, spans, strict=True) if not c.isspace()]
    return "".join(c for c, _ in kept), [s for _, s in kept]


def _places(left: str, right: str, right_spans: list[Span]) -> list[Span]:
    """The span behind each character of `left`, read off its match with `right`."""
    places: list[Span] = []
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    for _, i1, i2, j1, j2 in matcher.get_opcodes():
        if i2 - i1 == j2 - j1:
            places += right_spans[j1:j2]
        elif j1 < j2:
            places += [(right_spans[j1][0], right_spans[j2 - 1][1])] * (i2 - i1)
        else:
            places += [right_spans[min(j1, len(right_spans) - 1)]] * (i2 - i1)
    return places
