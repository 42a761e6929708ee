"""Where text and image tokens stand among the queries and keys of one attention call."""

from __future__ import annotations

from typing import NamedTuple

from hookctl.address.sites import Site
from hookctl.errors import UnsupportedError


class Spans(NamedTuple):
    """(start, stop) of the image's queries, and of the image's and the text's keys."""

    image_queries: tuple[int, int]
    image_keys: tuple[int, int] | None
    text_keys: tuple[int, int] | None


def spans_of(site: Site, queries: int, keys: int, text: int | None, order: str | None) -> Spans:
    """text: tokens of the text; order: of a joint sequence, "image_text" or "text_image"."""
    n, m = queries, keys
    if site.kind == "cross":
        return Spans((0, n), None, (0, m))
    if site.kind != "joint":
        return Spans((0, n), (0, m), None)
    if text is None or text >= m:
        raise UnsupportedError(
            f"{site.path}: the length of the text in this joint sequence of {m} tokens is unknown"
        )
    image = m - text
    if order == "image_text":
        return Spans((0, min(n, image)), (0, image), (image, m))
    return Spans((n - image, n), (text, m), (0, text))
