"""Token maps of Prompt-to-Prompt, against the official algorithm written out a second time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.address.alignment import refinement_map, replacement_map
from hookctl.address.words import PromptTokens
from hookctl.errors import AlignmentError
from tests.zoo.text import MORE, clip_tokenizer, t5_tokenizer

LENGTH = 24
CLIP = clip_tokenizer(length=LENGTH, known=MORE)


def clip(text: str, length: int | None = None) -> PromptTokens:
    return PromptTokens.encode(text, CLIP, length)


def official_places(text: str, tokenizer: Any) -> list[list[int]]:
    """Tokens of each space-separated word, by the lengths of decoded pieces."""
    words = text.split(" ")
    places: list[list[int]] = [[] for _ in words]
    word, letters = 0, 0
    for n, token in enumerate(tokenizer.encode(text)[1:-1], start=1):
        places[word].append(n)
        letters += len(tokenizer.decode([token]).strip("#"))
        if letters >= len(words[word]):
            word, letters = word + 1, 0
    return places


def official_replacement(x: str, y: str, tokenizer: Any, size: int) -> Tensor:
    """The walk along both prompts, step by step, with its slip after the last changed word."""
    places = zip(official_places(x, tokenizer), official_places(y, tokenizer), strict=True)
    pairs = zip(x.split(" "), y.split(" "), places, strict=True)
    queue = [place for old, new, place in pairs if old != new]
    table = torch.zeros(size, size)
    row = column = 0
    while max(row, column) < size:
        if queue and queue[0][0][0] == row:
            olds, news = queue.pop(0)
            for k, old in enumerate(olds):
                for m, new in enumerate(news):
                    if len(olds) != len(news):
                        table[old, new] = 1 / len(news)
                    elif k == m:
                        table[old, new] = 1
            row, column = row + len(olds), column + len(news)
        else:
            table[row if queue else column, column] = 1
            row, column = row + 1, column + 1
    return table


def official_refinement(x: str, y: str, tokenizer: Any, size: int) -> tuple[list[int], Tensor]:
    """Alignment of the token ids with specials: source index (or -1) and flag of each target."""
    a, b = tokenizer.encode(x), tokenizer.encode(y)
    best = torch.zeros(len(a) + 1, len(b) + 1, dtype=torch.long)
    step = {(0, 0): "stop"}
    step.update({(0, n): "target" for n in range(1, len(b) + 1)})
    step.update({(n, 0): "source" for n in range(1, len(a) + 1)})
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            options = {
                "target": int(best[i, j - 1]),
                "source": int(best[i - 1, j]),
                "both": int(best[i - 1, j - 1]) + (1 if a[i - 1] == b[j - 1] else -1),
            }
            best[i, j] = max(options.values())
            step[i, j] = max(options, key=lambda name: options[name])  # the first of equals
    mapper = [-1] * len(b)
    i, j = len(a), len(b)
    while step[i, j] != "stop":
        kind = step[i, j]
        if kind == "both":
            mapper[j - 1] = i - 1
        i -= kind != "target"
        j -= kind != "source"
    flags = torch.tensor([float(m != -1) for m in mapper] + [1.0] * (size - len(b)))
    return mapper + list(range(len(b), size)), flags


REPLACEMENTS = [
    ("a cat sits on grass", "a cat sits on grass"),
    ("a cat sits on grass", "a dog sits on grass"),
    ("a cat sits on grass", "a xyz sits on grass"),
    ("a xyz sits on grass", "a cat sits on grass"),
    ("a wxyz sits on grass", "a ox sits on grass"),
    ("a cat sits on xy", "a xyz sits on grass"),
    ("cat xyz sits xyz cat", "dog cat sits xyz xy"),
    ("a cat, red circle, blue", "a xy, red square, blue"),
    ("a Cat sits", "a cat sits"),
    ("the café sits and big", "the dog sits on big"),
    ("xyz", "wxyz"),
]


@pytest.mark.parametrize("x, y", REPLACEMENTS)
def test_paper_replacement_is_the_official_one(x: str, y: str) -> None:
    ours = replacement_map(clip(x), clip(y), paper=True)
    assert torch.equal(ours, official_replacement(x, y, CLIP, LENGTH))


def test_paper_replacement_misaligns_the_tail() -> None:
    """The known example: 'sits' reads 'grass', 'on' the end, 'grass' padding."""
    source, target = clip("a cat sits on grass"), clip("a xyz sits on grass")
    paper = replacement_map(source, target, paper=True)
    (sits,), (on,), (grass,) = (target.find(w) for w in ("sits", "on", "grass"))
    assert paper[source.find("grass")[0], sits] == 1
    assert paper[source.end, on] == 1 and paper[source.end + 1, grass] == 1
    back = replacement_map(target, source, paper=True)
    assert back[:, -2:].abs().max() == 0


def test_replacement_keeps_the_words_behind_the_changed_one() -> None:
    source, target = clip("a cat sits on grass"), clip("a xyz sits on grass")
    for old, new in ((source, target), (target, source)):
        matrix = replacement_map(old, new)
        for word in ("a", "sits", "on", "grass"):
            assert matrix[old.find(word)[0], new.find(word)[0]] == 1
        assert matrix[old.end, new.end] == 1 and matrix[0, 0] == 1
        assert matrix[old.end + 1, new.end + 1] == 1
    matrix = replacement_map(source, target)
    assert matrix[2, 2:5].tolist() == pytest.approx([1 / 3] * 3)
    assert replacement_map(target, source)[2:5, 2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("x, y", REPLACEMENTS)
@pytest.mark.parametrize("lengths", [(24, 24), (24, 40), (40, 24)])
def test_replacement_hands_out_every_token_once(x: str, y: str, lengths: tuple[int, int]) -> None:
    source, target = clip(x, lengths[0]), clip(y, lengths[1])
    matrix = replacement_map(source, target, dtype=torch.float64)
    assert matrix.shape == lengths and matrix.dtype == torch.float64
    torch.testing.assert_close(matrix.sum(1), torch.ones(lengths[0], dtype=torch.float64))
    assert matrix.sum(0).min() > 0
    for old, new in zip(source.words, target.words, strict=True):
        inside = matrix[list(old.tokens)][:, list(new.tokens)].sum()
        assert inside == pytest.approx(len(old.tokens))


def test_replacement_without_padding() -> None:
    source, target = clip("a cat", 4), clip("a xyz", 8)  # 'a cat' fills its sequence
    matrix = replacement_map(source, target)
    torch.testing.assert_close(matrix.sum(1), torch.ones(4))
    assert matrix[3, 5:].tolist() == pytest.approx([1 / 3] * 3)  # end to end and both paddings
    assert replacement_map(target, source)[5:, 3].tolist() == [1, 1, 1]


def test_replacement_keeps_punctuation_apart() -> None:
    source, target = clip("a cat, red"), clip("a xyz, red")
    matrix = replacement_map(source, target)
    comma = source.words[1].after[0], target.words[1].after[0]
    assert matrix[comma] == 1 and matrix[:, comma[1]].sum() == 1
    bare = clip("a dog red")
    matrix = replacement_map(source, bare)  # 'cat' and ',' both feed 'dog'
    assert matrix[2:4, 2].tolist() == [1, 1] and matrix[source.find("red")[0], 3] == 1


def test_equal_counts_agree_with_the_paper() -> None:
    source, target = clip("a red cat and a red circle"), clip("a blue cat and a blue square")
    assert torch.equal(replacement_map(source, target), replacement_map(source, target, paper=True))
    assert torch.equal(replacement_map(source, target), torch.eye(LENGTH))


def test_two_edits_with_different_token_counts() -> None:
    source, target = clip("a cat on a wxyz circle"), clip("a xyz on a dog circle")
    matrix = replacement_map(source, target)
    assert matrix[source.find("on")[0], target.find("on")[0]] == 1
    assert matrix[list(source.find("wxyz")), target.find("dog")[0]].tolist() == [1] * 4
    assert matrix[source.find("circle")[0], target.find("circle")[0]] == 1


@pytest.mark.parametrize("paper", [False, True])
def test_replacement_refuses_other_word_counts(paper: bool) -> None:
    with pytest.raises(AlignmentError, match="has 2 and 'a red cat' has 3: use 'refine'"):
        replacement_map(clip("a cat"), clip("a red cat"), paper=paper)


def test_paper_needs_one_length() -> None:
    for mapping in (replacement_map, refinement_map):
        with pytest.raises(AlignmentError, match="one padded length, got 24 and 40"):
            mapping(clip("a cat"), clip("a dog", 40), paper=True)


def test_paper_replacement_refuses_what_its_count_cannot_place() -> None:
    # The empty word between two spaces swallows a token, so that the last word gets none.
    with pytest.raises(AlignmentError, match="leave out paper=True"):
        replacement_map(clip("a  cat"), clip("a  dog"), paper=True)
    assert torch.equal(replacement_map(clip("a  cat"), clip("a  dog")), torch.eye(LENGTH))


REFINEMENTS = [
    *REPLACEMENTS,
    ("a cat", "a red cat sits on grass"),
    ("a red cat sits on grass", "a cat"),
    ("a cat and a dog", "a big cat and a red dog"),
    ("a a a cat", "a cat a a"),
    ("a", "a a a"),
    ("wxyz cat", "wxy cat xyz"),
    ("", "a cat"),
    ("a cat", ""),
]


@pytest.mark.parametrize("x, y", REFINEMENTS)
def test_paper_refinement_is_the_official_one(x: str, y: str) -> None:
    gather, aligned = refinement_map(clip(x), clip(y), paper=True)
    mapper, flags = official_refinement(x, y, CLIP, LENGTH)
    assert torch.equal(aligned, flags)
    torch.manual_seed(0)
    attention = torch.rand(5, LENGTH)
    assert torch.equal((attention @ gather) * aligned, attention[:, mapper] * flags)


@pytest.mark.parametrize("x, y", REFINEMENTS)
def test_refinement_pairs_equal_tokens_in_order(x: str, y: str) -> None:
    source, target = clip(x), clip(y, 40)
    gather, aligned = refinement_map(source, target)
    assert gather.shape == (24, 40) and torch.equal(gather.sum(0), aligned)
    assert gather.sum(1).max() == 1  # no source token serves twice
    rows = [int(gather[:, n].argmax()) for n in range(40) if aligned[n]]
    assert rows == sorted(rows)
    assert all(source.ids[m] == target.ids[n] for m, n in gather.nonzero().tolist())
    assert gather[0, 0] == 1 and gather[source.end, target.end] == 1


@pytest.mark.parametrize("text", ["a cat sits", "a xyz, a xyz & a café", ""])
@pytest.mark.parametrize("paper", [False, True])
def test_equal_prompts_give_the_identity(text: str, paper: bool) -> None:
    prompt = clip(text)
    assert torch.equal(replacement_map(prompt, prompt, paper=paper), torch.eye(LENGTH))
    gather, aligned = refinement_map(prompt, prompt, paper=paper)
    assert torch.equal(gather, torch.eye(LENGTH)) and torch.equal(aligned, torch.ones(LENGTH))


def test_refinement_of_one_token_words_differs_in_padding_only() -> None:
    source, target = clip("a cat and a dog"), clip("a blue cat and a red dog with a square")
    (ours, flags), (paper, paper_flags) = (
        refinement_map(source, target, paper=p) for p in (False, True)
    )
    upto = target.end + 1
    assert torch.equal(ours[:, :upto], paper[:, :upto])
    assert torch.equal(flags[:upto], paper_flags[:upto])
    assert ours[source.end + 1, target.end + 1] == 1


def test_refinement_to_a_shorter_prompt_keeps_words_out_of_padding() -> None:
    source, target = clip("a red cat sits on grass"), clip("a cat")
    paper, _ = refinement_map(source, target, paper=True)
    assert paper[source.find("sits")[0], target.end + 1] == 1  # the official slip
    ours, aligned = refinement_map(source, target)
    assert ours[: source.end, target.end :].abs().max() == 0
    assert aligned[-4:].sum() == 0 and aligned[:-4].sum() == LENGTH - 4  # surplus padding is free


def test_refinement_leaves_half_shared_words_free() -> None:
    source, target = clip("a wxyz sits"), clip("a vxyz sits")
    _, paper = refinement_map(source, target, paper=True)
    _, ours = refinement_map(source, target)
    word = list(target.find("vxyz"))
    assert paper[word].sum() == 3 and ours[word].sum() == 0
    assert ours[list(target.find("sits"))] == 1


def test_without_beginning_token() -> None:
    t5 = t5_tokenizer(length=12, known=MORE)
    source, target = (PromptTokens.encode(f"a {w} sits", t5) for w in ("cat", "xyz"))
    matrix = replacement_map(source, target)
    assert matrix[2, target.find("sits")[0]] == 1 and matrix[source.end, target.end] == 1
    torch.testing.assert_close(matrix.sum(1), torch.ones(12))
    gather, aligned = refinement_map(source, target)
    assert aligned[list(target.find("xyz"))].sum() == 0 and gather[2, target.end - 1] == 1
