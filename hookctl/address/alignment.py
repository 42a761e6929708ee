"""Which token of one prompt answers to which token of another: the maps of Prompt-to-Prompt.

Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626.
A map M [T_source, T_target] carries the source's attention over to the target's tokens, A_s M,
where A_s [N, T_source] has rows over tokens. Both functions work on the padded sequences.

In both maps the default rule for what surrounds the words is the same: beginning meets beginning,
end-of-text meets end-of-text, and padding meets padding counted from there. The official code
keeps absolute positions instead, so that prompts of different lengths exchange words, end and
padding; `paper=True` reproduces it for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hookctl.address.words import PromptTokens, Word
from hookctl.errors import AlignmentError

__all__ = ["AlignmentError", "refinement_map", "replacement_map"]


def replacement_map(
    source: PromptTokens,
    target: PromptTokens,
    *,
    paper: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The map of P2P 'replace': word k of the source answers to word k of the target.

    Receives: two prompts with equally many words (separated by white space).
    Returns: M [T_source, T_target]; column n says which source tokens feed target token n.

    Words with equally many tokens meet token by token; otherwise every source token gives
    1/n_target to each target token of the word. Punctuation that clings to a word is matched
    apart from it where both prompts have it, and as part of the word where only one has. Surplus
    source padding goes to the last target padding; where the target has more, the last source
    padding is shared out. Every source token thus hands out its attention exactly once: **rows sum
    to 1** (total attention is kept), and a column sums to n_source / n_target of its word, never
    to 0. Equal prompts give exactly the identity.

    `paper=True` gives the official `get_replacement_mapper_` instead: words split at single
    spaces, and after the last replaced word the *target* index on both axes, which misaligns
    everything behind it when token counts differ and leaves columns empty when the target is
    shorter. Pieces are measured by character spans, which is what decoding them gives for any text
    that normalisation does not lengthen or shorten.

    Raises `AlignmentError` where word counts differ, or (paper) where lengths T differ.
    """
    if paper:
        return _paper_replacement(source, target).to(dtype)
    _same_count(source, target, len(source.words), len(target.words))
    matrix = torch.zeros(source.length, target.length, dtype=torch.float64)
    for old, new in zip(source.words, target.words, strict=True):
        for s, t in _word_blocks(old, new):
            if bool(s) != bool(t):
                raise AlignmentError(
                    f"the tokenizer leaves no token for {(new if s else old).text!r}: "
                    "leave that word out, or use 'refine'"
                )
            _share(matrix, s, t)
    for near, far in _surroundings(source, target):
        common = min(len(near), len(far)) - 1
        if common >= 0:
            _share(matrix, near[:common], far[:common])
            _share(matrix, near[common:], far[common:])
    return matrix.to(dtype)


def refinement_map(
    source: PromptTokens,
    target: PromptTokens,
    *,
    paper: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The map of P2P 'refine': what both prompts share is carried over, what is new stays free.

    A global alignment (match 1, mismatch -1, gap 0; on ties an insertion in the target, then a
    deletion, then a match) pairs equal tokens in order.

    Receives: two prompts of any word counts.
    Returns: the gather matrix G [T_source, T_target], whose column n has a single 1 at the source
    token of target token n, and `aligned` [T_target], 1 where there is one. Where there is none
    the column is 0 and so is the flag: A' = (A_s G) aligned + A_e (1 - aligned). Nothing is
    renormalised, as in the official code. Equal prompts give exactly the identity and ones.

    The default differs from the official `get_mapper` in two things. Words are aligned whole, so
    that two different words which happen to share a piece are not tied together halfway (with
    one-token words this changes nothing). And target padding meets source padding; target padding
    beyond the source's is not aligned. `paper=True` aligns single tokens, and behind the target's
    end takes the source token at the same absolute position, flagged 1, be it a word or not.
    (The official mapper writes -1 for "no source" and gathers the last source token there; its
    flag multiplies that by 0, which the zero column here equals.)

    Raises `AlignmentError` (paper only) where the lengths T differ.
    """
    pairs: list[tuple[int, int]] = []
    if paper:
        _same_length(source, target)
        behind = min(target.end + 1, target.length)
        before = min(source.end + 1, source.length)
        pairs += _align(
            [(p,) for p in range(before)], [(p,) for p in range(behind)], source, target
        )
        pairs += [(n, n) for n in range(behind, target.length)]
    else:
        pairs += _align(_units(source), _units(target), source, target)
        for near, far in _surroundings(source, target):
            pairs += zip(near, far, strict=False)
    gather = torch.zeros(source.length, target.length, dtype=dtype)
    for s_position, t_position in pairs:
        gather[s_position, t_position] = 1
    return gather, gather.sum(0)


def _same_count(source: PromptTokens, target: PromptTokens, n_source: int, n_target: int) -> None:
    """Refuse 'replace' between prompts of different word counts."""
    if n_source != n_target:
        raise AlignmentError(
            f"'replace' needs prompts with equally many words, but {source.text!r} has {n_source} "
            f"and {target.text!r} has {n_target}: use 'refine'"
        )


def _same_length(source: PromptTokens, target: PromptTokens) -> None:
    """Refuse sequences that the official code, which has one length, cannot express."""
    if source.length != target.length:
        raise AlignmentError(
            f"the paper's map needs one padded length, got {source.length} and {target.length}: "
            "encode both prompts with the same length, or leave out paper=True"
        )


def _share(matrix: Tensor, source: Sequence[int], target: Sequence[int]) -> None:
    """One to one where counts agree; else each source token spread evenly over the targets."""
    if len(source) == len(target):
        matrix[list(source), list(target)] = 1
    else:
        for s in source:
            matrix[s, list(target)] = 1 / len(target)


def _word_blocks(old: Word, new: Word) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token groups of two words that answer to each other."""
    if bool(old.before) == bool(new.before) and bool(old.after) == bool(new.after):
        return [(old.before, new.before), (old.tokens, new.tokens), (old.after, new.after)]
    return [(old.before + old.tokens + old.after, new.before + new.tokens + new.after)]


def _surroundings(
    source: PromptTokens, target: PromptTokens
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Positions before and behind the words of both prompts, counted away from the words."""
    yield range(source.start)[::-1], range(target.start)[::-1]
    yield range(source.end, source.length), range(target.end, target.length)


def _units(prompt: PromptTokens) -> list[tuple[int, ...]]:
    """What moves as one in an alignment: the tokens of a word, single tokens of punctuation."""
    units: list[tuple[int, ...]] = []
    for word in prompt.words:
        units += [(p,) for p in word.before]
        units += [word.tokens] if word.tokens else []
        units += [(p,) for p in word.after]
    return units


def _align(
    left: Sequence[tuple[int, ...]],
    right: Sequence[tuple[int, ...]],
    source: PromptTokens,
    target: PromptTokens,
) -> list[tuple[int, int]]:
    """Needleman-Wunsch over units; the (source, target) positions of the units that were paired.

    A mismatch scores less than the two gaps that replace it, so only equal units are ever paired.
    """
    x = [tuple(source.ids[p] for p in unit) for unit in left]
    y = [tuple(target.ids[p] for p in unit) for unit in right]
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]  # gaps cost 0, so the border is 0
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            paired = score[i][j] + (1 if a == b else -1)
            score[i + 1][j + 1] = max(score[i + 1][j], score[i][j + 1], paired)
    pairs: list[tuple[int, int]] = []
    i, j = len(x), len(y)
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs += zip(left[i], right[j], strict=True)
    return pairs


def _paper_replacement(source: PromptTokens, target: PromptTokens) -> Tensor:
    """The official replacement map, misaligned tail included: float64 [T, T]."""
    _same_length(source, target)
    old, new = source.text.split(" "), target.text.split(" ")
    _same_count(source, target, len(old), len(new))
    changed = [k for k in range(len(old)) if old[k] != new[k]]
    if changed:  # without a change the official code counts no pieces, and can't stumble over them
        old_tokens, new_tokens = _counted_words(source, old), _counted_words(target, new)
    matrix = torch.zeros(source.length, source.length, dtype=torch.float64)
    i = j = 0
    for k in changed:
        s, t = old_tokens[k], new_tokens[k]
        if not s or not t:
            raise AlignmentError(
                f"the paper's count of pieces finds no token for {old[k]!r} -> {new[k]!r}: "
                "leave out paper=True"
            )
        steps = s[0] - i
        _share(matrix, range(i, i + steps), range(j, j + steps))
        _share(matrix, s, t)
        i, j = i + steps + len(s), j + steps + len(t)
    # The walk ends when either index runs out, but writes the target's index on both axes.
    rest = range(j, j + source.length - max(i, j))
    _share(matrix, rest, rest)
    return matrix


def _counted_words(prompt: PromptTokens, words: list[str]) -> list[list[int]]:
    """Tokens per word as the official code finds them: pieces fill up each word's letter count."""
    tokens: list[list[int]] = [[] for _ in words]
    k = filled = 0
    for position in range(prompt.start, prompt.end):
        if k == len(words):
            raise AlignmentError(
                f"the paper's count of pieces runs past the words of {prompt.text!r}: "
                "leave out paper=True"
            )
        tokens[k].append(position)
        first, last = prompt.offsets[position]
        filled += last - first
        if filled >= len(words[k]):
            k, filled = k + 1, 0
    return tokens
