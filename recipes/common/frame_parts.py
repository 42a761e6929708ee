"""Parts of a text, each for its own frames of a video: what the words of one cost a frame.

Chen et al., "Prompt Relay", arXiv 2604.10030, and its port for MiniMax-H3 (the form with a tail).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hookctl.address.text import PromptText

EPSILON = 1e-3
MOST = 1e4  # a cost that half precision holds; exp(-1e4) is 0


def spans_of(lengths: Sequence[float], frames: int) -> list[tuple[int, int]]:
    """(first, last + 1) frame of each part; lengths: relative to one another."""
    ends = [round(frames * end / sum(lengths)) for end in itertools.accumulate(lengths)]
    return list(itertools.pairwise([0, *ends]))


def faded(spans: Sequence[tuple[int, int]], frames: int, tail: float) -> Tensor:
    """Costs [frames, parts] that are 0 in a part's own frames and ln(1 / epsilon) after `tail`."""
    middle = torch.tensor([(start + stop - 1) / 2 for start, stop in spans])
    half = torch.tensor([(stop - start - 1) / 2 for start, stop in spans])
    return _cost(frames, middle, half, tail / math.sqrt(2 * math.log(1 / EPSILON)))


def published(spans: Sequence[tuple[int, int]], frames: int) -> Tensor:
    """Costs [frames, parts] as the official code has them."""
    middle = torch.tensor([(start + stop) // 2 for start, stop in spans])
    half = torch.tensor([max((stop - start) / 2 - 2, 0) for start, stop in spans])
    return _cost(frames, middle, half, 1 / math.log(1 / EPSILON))


def _cost(frames: int, middle: Tensor, half: Tensor, sigma: float) -> Tensor:
    away = (torch.arange(frames)[:, None] - middle).abs() - half
    return (away.double().clamp_min(0) ** 2 / (2 * sigma**2)).clamp_max(MOST)


def places_of(parts: Sequence[str], text: PromptText, after: str = "") -> list[list[int]]:
    """The token positions of parts that follow one another in a text, behind what begins it; none
    of a part that is not there."""
    found: list[list[int]] = [[] for _ in parts]
    for first, tokens in text.streams:
        place = max(tokens.text.find(after), 0) + len(after)
        for part, own in zip(parts, found, strict=True):
            at = tokens.text.find(part, place)
            if at >= 0:
                place = at + len(part)
                own += [first + p for p in tokens.overlapping((at, place))]
    return found
