"""Words to token positions, with tokenizers built in memory."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from hookctl.address.offsets import fold, piece_spans
from hookctl.address.words import PromptTokens, WordEdit, changed_words
from hookctl.errors import InputError, WordError
from tests.zoo.text import MORE, clip_tokenizer, t5_tokenizer


class Slow:
    """A tokenizer that reports no offsets, as CLIP's and T5's did before transformers 5."""

    is_fast = False

    def __init__(self, fast: Any, byte_level: bool) -> None:
        self.fast = fast
        for name in ("model_max_length", "pad_token_id", "eos_token_id", "unk_token"):
            setattr(self, name, getattr(fast, name))
        if byte_level:
            self.byte_decoder = byte_alphabet()

    def __call__(self, text: str, return_offsets_mapping: bool, **options: Any) -> Any:
        assert not return_offsets_mapping, "slow tokenizers raise on this"
        return self.fast(text, **options)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return list(self.fast.convert_ids_to_tokens(ids))


def byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte, as CLIP and GPT-2 have it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


CLIP, T5 = clip_tokenizer(length=24, known=MORE), t5_tokenizer(length=16, known=MORE)


def clip(text: str, length: int | None = None) -> PromptTokens:
    return PromptTokens.encode(text, CLIP, length)


def covered(prompt: PromptTokens, positions: tuple[int, ...]) -> str:
    """The text behind token positions, without repeats."""
    spans = sorted({prompt.offsets[p] for p in positions})
    return "".join(prompt.text[a:b] for a, b in spans)


def test_encode_pads_and_marks_the_content() -> None:
    prompt = clip("a cat sits")
    assert prompt.length == len(prompt.ids) == len(prompt.offsets) == CLIP.model_max_length
    assert (prompt.start, prompt.end) == (1, 4)
    assert prompt.ids[0] == CLIP.bos_token_id
    assert set(prompt.ids[4:]) == {CLIP.eos_token_id}
    assert prompt.offsets[:5] == ((0, 0), (0, 1), (2, 5), (6, 10), (0, 0))
    padded = CLIP("a cat sits", padding="max_length", max_length=24)["input_ids"]
    assert list(prompt.ids) == padded


def test_encode_without_beginning_token() -> None:
    prompt = PromptTokens.encode("a cat", T5)
    assert (prompt.start, prompt.end, prompt.length) == (0, 2, 16)
    assert prompt.ids[2] == T5.eos_token_id and set(prompt.ids[3:]) == {T5.pad_token_id}


@pytest.mark.parametrize("tokenizer, start", [(CLIP, 1), (T5, 0)], ids=["clip", "t5"])
def test_encode_empty_prompt(tokenizer: Any, start: int) -> None:
    prompt = PromptTokens.encode("", tokenizer)
    assert prompt.start == prompt.end == start
    assert prompt.ids[start] == tokenizer.eos_token_id
    assert prompt.words == ()
    with pytest.raises(WordError):
        prompt.find("cat")


def test_encode_lengths() -> None:
    assert clip("a cat", 4).length == 4
    with pytest.raises(InputError, match="has 4 tokens.* at most 3 fit"):
        clip("a cat", 3)
    endless = clip_tokenizer(length=int(1e30), known=MORE)
    assert PromptTokens.encode("a cat", endless).length == 4
    with pytest.raises(InputError, match="one string"):
        PromptTokens.encode(["a cat"], CLIP)  # type: ignore[arg-type]


def test_encode_padded_on_the_left() -> None:
    tokenizer = clip_tokenizer(length=8, known=MORE)
    tokenizer.padding_side = "left"
    prompt = PromptTokens.encode("a cat", tokenizer)
    assert (prompt.start, prompt.end) == (5, 7)
    assert prompt.find("cat") == (6,)


@pytest.mark.parametrize(
    "text, phrase, expected",
    [
        ("a cat sits on grass", "cat", "cat"),
        ("a Cat, sits", "cat", "Cat"),
        ("a cat, sits", "Cat,", "cat,"),
        ("a cat sits", "cat,", "cat"),
        ("a  cat   sits\n on", "cat sits", "catsits"),
        ("a xylophone sits", "xylophone", "xylophone"),
        ("a red, circle", "red circle", "red,circle"),
        ("a red-blue cat", "red", "red"),
        ("a red-blue cat", "red blue", "red-blue"),
        ("the dog's cat", "dog", "dog"),
        ("a “cat” sits", "cat", "cat"),
        ("İstanbul cat", "istanbul", ""),
        ("İ cat", "cat", "cat"),
        ("un cafe\u0301 cat", "café", "cafe"),
        ("un CAFÉ cat", "cafe\u0301", "CAFÉ"),
        ("一只猫坐着", "猫", "猫"),
        ("a cat & dog", "&", "&"),
        ("(cat:1.2)", "cat", "cat"),
    ],
)
def test_find_by_characters(text: str, phrase: str, expected: str) -> None:
    prompt = clip(text, 32)
    if expected:
        assert covered(prompt, prompt.find(phrase)) == expected
    else:
        with pytest.raises(WordError):
            prompt.find(phrase)


def test_find_respects_word_boundaries() -> None:
    with pytest.raises(WordError):
        clip("concatenate a category").find("cat")


def test_find_multi_token_word_in_full() -> None:
    prompt = clip("a xyz sits on xyz")
    assert prompt.find("xyz") == (2, 3, 4, 7, 8, 9)
    assert prompt.find("xyz", occurrence=1) == (7, 8, 9)
    with pytest.raises(WordError, match=r"occurs 2 time.*0\.\.1, got 2"):
        prompt.find("xyz", occurrence=2)
    with pytest.raises(WordError):
        prompt.find("xyz", occurrence=-1)


def test_find_counts_partly_covered_tokens() -> None:
    prompt = clip("a red-blue, cat")
    assert covered(prompt, prompt.overlapping((4, 8))) == "red-blue"


def test_unknown_phrase_says_what_there_is() -> None:
    with pytest.raises(WordError) as error:
        clip("a red circle, sits").find("Circel")
    message = str(error.value)
    assert "['a', 'red', 'circle', 'sits']" in message and "did you mean 'circle'" in message
    with pytest.raises(WordError):
        clip("a cat").find(" ")


def test_find_takes_positions() -> None:
    prompt = clip("a cat")
    assert prompt.find(2) == (2,)
    assert prompt.find([3, 0]) == (3, 0)
    for wrong in (24, -1, [], [1, 99], True, [1.0], None):
        with pytest.raises(WordError):
            prompt.find(wrong)  # type: ignore[arg-type]
    with pytest.raises(WordError, match="occurrence"):
        prompt.find(2, occurrence=0)


def test_words_set_punctuation_apart() -> None:
    prompt = clip("A (red) circle, & xy.")
    assert [w.text for w in prompt.words] == ["A", "red", "circle", "&", "xy"]
    a, red, circle, sign, xy = prompt.words
    assert (red.before, red.tokens, red.after) == ((2,), (3,), (4,))
    assert (circle.tokens, circle.after) == ((5,), (6,))
    assert sign.tokens == (7,) and sign.before == sign.after == ()
    assert (xy.tokens, xy.after) == ((8, 9), (10,))
    assert prompt.text[slice(*xy.span)] == "xy" and a.tokens == (1,)


def test_unigram_pieces() -> None:
    prompt = PromptTokens.encode("the  xy cat, sits", T5)
    assert [covered(prompt, w.tokens) for w in prompt.words] == ["the", "xy", "cat", "sits"]
    assert len(prompt.find("xy")) == 3  # the lone '▁' opens the word
    assert covered(prompt, prompt.find("cat")) == "cat"


def test_unknown_piece_keeps_the_rest_in_place() -> None:
    prompt = PromptTokens.encode("a 猫 cat", T5)
    assert T5.unk_token_id in prompt.ids
    assert prompt.find("cat") == (prompt.end - 1,)
    assert covered(prompt, prompt.find("猫")) == "猫"


SENTENCES = [
    "a cat sits on grass",
    "A  Cat,   xyz SITS.",
    " the dog's (red) café, cat ",
    "un cafe\u0301 cat",
    "a 猫 cat 😀 dog",
    "a 2024 cat\n\tsits",
    "",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_slow_tokenizer_finds_the_words_of_the_fast_one(text: str) -> None:
    fast = PromptTokens.encode(text, CLIP, 40)
    slow = PromptTokens.encode(text, Slow(CLIP, byte_level=True), 40)
    assert (slow.ids, slow.start, slow.end) == (fast.ids, fast.start, fast.end)
    assert [w.tokens for w in slow.words] == [w.tokens for w in fast.words]
    if text == unicodedata.normalize("NFC", text):  # else the fast one leaves the accent out
        assert slow.offsets == fast.offsets


@pytest.mark.parametrize("text", ["a cat, xy sits", "The 猫 cat", "a  b.  猫猫 dog", ""])
def test_slow_unigram_tokenizer(text: str) -> None:
    fast = PromptTokens.encode(text, T5)
    slow = PromptTokens.encode(text, Slow(T5, byte_level=False))
    assert (slow.ids, slow.start, slow.end) == (fast.ids, fast.start, fast.end)
    assert [w.tokens for w in slow.words] == [w.tokens for w in fast.words]


def test_slow_pieces_survive_a_repairing_normaliser() -> None:
    """ftfy straightens quotation marks before a slow CLIP tokenizer sees them."""
    straight = "a 'big' cat"
    ids = CLIP(straight)["input_ids"][1:-1]
    spans = piece_spans("a ‘big’  CAT", ids, Slow(CLIP, byte_level=True))
    assert [straight[a:b] for a, b in spans[:-1]] == ["a", "'", "bi", "g", "'"]
    assert spans[-1] == (9, 12)


def test_words_lose_no_token_to_a_normaliser() -> None:
    """'&amp;' becomes '&', whose token covers the first character only."""
    ids = CLIP("a & cat")["input_ids"]
    offsets = ((0, 0), (0, 1), (2, 3), (8, 11), (0, 0))
    prompt = PromptTokens("a &amp; cat", tuple(ids), offsets, 1, 4)
    assert [w.tokens for w in prompt.words] == [(1,), (2,), (3,)]
    with pytest.raises(WordError, match="no token"):
        prompt.find("amp")


def test_fold_keeps_the_way_back() -> None:
    text = "Stra\u00dfe E\u0301"
    folded, spans = fold(text)
    assert folded == "strasse é"
    assert [text[slice(*s)] for s in spans[4:6]] == ["ß", "ß"]
    assert spans[-1] == (7, 9)


def test_changed_words() -> None:
    source = clip("a red circle above a dog")
    assert changed_words(source, clip("A red circle, above a dog")) == []
    assert changed_words(source, clip("a blue circle above a cat")) == [
        WordEdit((1,), (1,)),
        WordEdit((5,), (5,)),
    ]
    assert changed_words(source, clip("a circle above a red dog")) == [
        WordEdit((1,), ()),
        WordEdit((), (4,)),
    ]
