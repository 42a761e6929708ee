"""Maps that move: one picture for each step or frame, all on one colour scale, as a GIF."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hookctl.errors import InputError
from hookctl.inspect.colours import Picture, scale_of
from hookctl.inspect.lettering import tag
from hookctl.inspect.show import heatmap, overlay

FASTEST = 20  # ms; viewers show anything faster more slowly


def moving(
    maps: Sequence[Tensor],
    labels: Sequence[str],
    images: Picture | Sequence[Picture] | None = None,
    *,
    cell: tuple[int, int] | None = None,
) -> list[Picture]:
    """The pictures of maps, one after the other.

    Receives: maps [h, w]; a label for each, for the corner; an image to lay them over, or one for
    each; without images the size of a picture (width, height) in px. Returns: RGB pictures.
    """
    over = list(images) if isinstance(images, Sequence) else [images] * len(maps)
    if not maps or not len(maps) == len(labels) == len(over):
        given = f"{len(maps)} maps, {len(labels)} labels, {len(over)} images"
        raise InputError(f"images: {given} given; as many of each, and a map or more, expected")
    scale, pictures = scale_of(maps), []
    for one, label, image in zip(maps, labels, over, strict=True):
        picture = (
            heatmap(one, cell, scale=scale) if image is None else overlay(image, one, scale=scale)
        )
        tag(picture, label)
        pictures.append(picture)
    return pictures


def gif_options(pictures: Sequence[Picture], milliseconds: int) -> dict[str, object]:
    """How Pillow saves the pictures as one GIF, by the first one's `save`; InputError for a time
    that none can be shown for."""
    if isinstance(milliseconds, bool) or not FASTEST <= milliseconds <= 60_000:
        raise InputError(
            f"milliseconds: {milliseconds!r} given; {FASTEST} to 60000 for each picture expected"
        )
    every: dict[str, object] = {"format": "GIF", "save_all": True, "loop": 0}
    return every | {"append_images": list(pictures[1:]), "duration": milliseconds}
