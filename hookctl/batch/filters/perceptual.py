"""Perceptual hashes of images, and which of many are nearly the same.

After the DCT hash (Zauner, "Implementation and benchmarking of perceptual image hash functions",
2010): an image is brought to 32 x 32, and of each colour the 8 x 8 lowest frequencies say by a bit
whether they lie above their median. A pair of images has 2 x 3 x 64 = 384 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, KEPT = 32, 8
BITS = 2 * 3 * KEPT * KEPT


def pair_hash(source: Image, edited: Image) -> str:
    """The hash of a pair, BITS / 4 hex digits."""
    import numpy as np

    bits = np.concatenate([_bits(image) for image in (source, edited)])
    return np.packbits(bits).tobytes().hex()


def _bits(image: Image) -> object:
    import numpy as np
    from PIL import Image as Images
    from scipy.fft import dctn

    small = image.convert("RGB").resize((SIDE, SIDE), Images.Resampling.BOX)
    values = np.asarray(small, np.float64)
    low = dctn(values, axes=(0, 1), norm="ortho")[:KEPT, :KEPT].reshape(-1, 3)
    # What is flat has frequencies of nothing but rounding; rounded, they are 0 everywhere.
    low = np.round(low, 3).T
    return (low > np.median(low, axis=1, keepdims=True)).ravel()


def duplicates(hashes: Sequence[str], near: int) -> dict[int, int]:
    """Of each that is a duplicate its number, and that of the first which it repeats.

    near: in how many bits two may differ. What repeats a duplicate of another is compared with the
    first only, so that a chain of small steps is not one image.
    """
    seen: dict[tuple[int, int], list[int]] = {}
    numbers = [int(text, 16) for text in hashes]
    found: dict[int, int] = {}
    for number, value in enumerate(numbers):
        # Two that differ in `near` bits agree in one of near + 1 bands.
        bands = [*_bands(value, near + 1)]
        near_ones = {other for band in bands for other in seen.get(band, ())}
        same = [n for n in sorted(near_ones) if (numbers[n] ^ value).bit_count() <= near]
        if same:
            found[number] = same[0]
            continue
        for band in bands:
            seen.setdefault(band, []).append(number)
    return found


def _bands(value: int, count: int) -> Iterator[tuple[int, int]]:
    ends = [BITS * n // count for n in range(count + 1)]
    for n in range(count):
        yield n, (value >> ends[n]) & ((1 << (ends[n + 1] - ends[n])) - 1)
