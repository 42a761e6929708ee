"""Where text and image stand among the queries and keys of a call."""

from __future__ import annotations

from typing import NamedTuple

from hookctl.address.sites import Grid, ImageTokens, Site
from hookctl.errors import UnsupportedError


class Spans(NamedTuple):
    """(start, stop) of the image's queries, and of the image's and the text's keys.

    The image is the one that is drawn; references: the keys of each further image of an edit
    model, in the order of the sequence.
    """

    image_queries: tuple[int, int]
    image_keys: tuple[int, int] | None
    text_keys: tuple[int, int] | None
    references: tuple[tuple[int, int], ...] = ()


def spans_of(
    site: Site,
    queries: int,
    keys: int,
    text: int | None,
    order: str | None,
    images: ImageTokens | None = None,
) -> Spans:
    """text: tokens of the text; order: of a joint sequence, "image_text" or "text_image"; images:
    those of the sequence, where the model's arguments tell them."""
    n, m = queries, keys
    if site.kind == "cross":
        return Spans((0, n), None, (0, m))
    if site.kind == "text":
        return Spans((0, n), None, (0, m))
    several = images is not None and len(images.grids) > 1
    if site.kind != "joint":
        if several and images is not None and images.count == n == m:
            target, references = _parts(images, 0)
            return Spans(target, target, None, references)
        return Spans((0, n), (0, m), None)
    asking = {None if text is None else m - text, None if images is None else images.count}
    if n < m and (n in asking or asking == {None}):
        count = n  # of text and image, the image alone asks
    elif images is not None and images.count <= m:
        count = images.count
    elif text is not None and text < m:
        count = m - text
    else:
        raise UnsupportedError(
            f"{site.path}: the length of the text in this joint sequence of {m} tokens is unknown"
        )
    words = m - count if text is None else min(text, m - count)
    first = order == "image_text"
    start = 0 if first else m - count
    text_keys = (m - words, m) if first else (0, words)
    keys_of_image, references = (start, start + count), ()
    if several and images is not None and images.count == count:
        keys_of_image, references = _parts(images, start)
    drawn = keys_of_image[1] - keys_of_image[0]
    if n == m:
        return Spans(keys_of_image, keys_of_image, text_keys, references)
    # Fewer queries than keys: the image's come last where the text asks too, and else are all.
    asked = 0 if first or n == count else n - drawn
    return Spans((asked, asked + min(n, drawn)), keys_of_image, text_keys, references)


def _parts(images: ImageTokens, start: int) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
    """(start, stop) of the target and of each reference among keys."""
    spans = []
    for grid in images.grids:
        spans.append((start, start + grid.tokens))
        start += grid.tokens
    target = spans.pop(images.target)
    return target, tuple(spans)


class Reference(NamedTuple):
    """One reference image among the keys: `k[..., start:stop, :]`, (start, stop) = keys."""

    keys: tuple[int, int]
    grid: Grid
