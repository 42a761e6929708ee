"""How instances of scenes are given to the tokenizer that learns: places in every format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hookctl.address.outlines import Array
from hookctl.learned.locations import points_of_mask, scribble_of_mask
from hookctl.learned.modules.unifusion import BOX, FORMATS, MASK, POINT, SCRIBBLE, Instances

from ..captions import describe
from ..world import IMAGE_SIZE, Thing

SLOTS = 6  # of a row
SCRIBBLE_POINTS, OUTLINE_POINTS = 8, 32
RASTER = 64  # px, side of a mask


class Way(NamedTuple):
    """How the instances of a batch are given: what the model is shown, and which shares of them
    have a box, a stroke and a mask (all have a point)."""

    formats: Collection[str]
    box: float = 1.0
    stroke: float = 0.0
    mask: float = 0.0


# With a share of the batches: as `learned.InstanceDiffusion` shows them to the model by default,
# and each format alone, which nothing else would make the model heed beside the point.
WAYS: tuple[tuple[float, Way], ...] = (
    (0.2, Way((BOX, POINT), box=0.9)),
    (0.15, Way((POINT,))),
    (0.2, Way(FORMATS, box=0.4, stroke=0.9, mask=0.3)),
    (0.15, Way((BOX, POINT, MASK), mask=0.9)),
    (0.1, Way((BOX,))),
    (0.1, Way((SCRIBBLE,), stroke=1.0)),
    (0.1, Way((MASK,), mask=1.0)),
)


def draw_way(rng: np.random.Generator) -> Way:
    shares, ways = zip(*WAYS, strict=True)
    return ways[int(rng.choice(len(ways), p=shares))]


class Place(NamedTuple):
    """Where a thing is, in every format; fractions of the canvas."""

    box: Array
    point: Array
    scribble: Array
    outline: Array
    raster: Array


def place_of(thing: Thing) -> Place:
    mask = thing.mask()
    raster = mask.reshape(RASTER, IMAGE_SIZE // RASTER, RASTER, -1).mean((1, 3)) >= 0.5
    x0, y0, x1, y1 = (side / IMAGE_SIZE for side in thing.box)
    return Place(
        np.array([x0, y0, x1, y1]),
        np.array([(x0 + x1) / 2, (y0 + y1) / 2]),
        scribble_of_mask(mask, SCRIBBLE_POINTS).ravel(),
        points_of_mask(mask, OUTLINE_POINTS).ravel(),
        raster,
    )


def in_slots(
    scenes: Sequence[Sequence[Thing]],
    rng: np.random.Generator,
    way: Way,
    encode: Callable[[Sequence[str]], Tensor],
    width: int,
    device: str,
) -> Instances:
    """The things of scenes in slots of any order.

    encode: captions as features [captions, width].
    """
    n = len(scenes)
    masks, located = np.zeros((n, SLOTS), np.float32), np.zeros((n, SLOTS), np.float32)
    boxes, points = np.zeros((n, SLOTS, 4)), np.zeros((n, SLOTS, 2))
    scribbles = np.zeros((n, SLOTS, 2 * SCRIBBLE_POINTS))
    outlines = np.zeros((n, SLOTS, 2 * OUTLINE_POINTS))
    rasters = np.zeros((n, SLOTS, RASTER, RASTER), np.float32)
    texts: dict[tuple[int, int], str] = {}
    for i, things in enumerate(scenes):
        for slot, thing in zip(rng.permutation(SLOTS), things, strict=False):
            at = i, int(slot)
            place = place_of(thing)
            masks[at], texts[at] = 1, describe(thing)
            boxes[at], points[at] = place.box, place.point
            located[at] = rng.random() < way.box
            if rng.random() < way.stroke:
                scribbles[at] = place.scribble
            if rng.random() < way.mask:
                outlines[at], rasters[at] = place.outline, place.raster
    phrases = torch.zeros(n, SLOTS, width)
    if texts:
        rows, slots = zip(*texts, strict=True)
        phrases[list(rows), list(slots)] = encode(list(texts.values())).cpu()
    made = [torch.from_numpy(x).float().to(device) for x in
            (masks, boxes, points, scribbles, outlines, rasters, located)]  # fmt: skip
    return Instances(made[0], phrases.to(device), *made[1:])


def mirrored(given: Instances) -> Instances:
    """The same instances, each in the place opposite to its own."""
    used = given.masks[..., None]
    x0, y0, x1, y1 = given.boxes.unbind(-1)
    boxes = torch.stack([1 - x1, 1 - y1, 1 - x0, 1 - y0], -1) * used
    return replace(given, boxes=boxes, points=(1 - given.points) * used)
