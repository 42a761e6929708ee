"""Measures of a draw that need no further model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hookctl.batch.filters.drawn import Drawn
from hookctl.batch.filters.specs import Unmeasured

EQUAL = 99.0  # dB, of images that do not differ at all


def background(drawn: Drawn) -> float:
    """PSNR in dB of what lies outside the places of the words: the rest must stay."""
    mask = drawn.mask
    if mask is None:
        raise Unmeasured("no map of a word")
    if mask.all():
        raise Unmeasured("the words are everywhere")
    source, edited = _pixels(drawn)
    error = float(((source - edited)[~mask] ** 2).mean())
    return min(EQUAL, -10 * float(np.log10(max(error, 1e-30))))


def overlap(drawn: Drawn) -> float:
    """Intersection over union, 0 to 1, of the places of the words in both images."""
    source, edited = drawn.masks
    if source is None or edited is None:
        raise Unmeasured("no map of a word in both prompts")
    return float((source & edited).sum() / max(int((source | edited).sum()), 1))


def change(drawn: Drawn) -> float:
    """Mean difference of the images, 0 to 1, at the places of the words, or anywhere."""
    source, edited = _pixels(drawn)
    difference = np.abs(source - edited).mean(-1)
    mask = drawn.mask
    return float((difference if mask is None else difference[mask]).mean())


def _pixels(drawn: Drawn) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both images, [height, width, 3] from 0 to 1."""
    source, edited = (np.asarray(image.convert("RGB"), float) / 255 for image in drawn.images)
    return source, edited
