"""Layout cases on the embedded world: a held-out prompt, and a box for each of its objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hookctl.demos.shapes.captions import describe, parse, sample
from hookctl.demos.shapes.detect import Detection, Found
from hookctl.demos.shapes.world import IMAGE_SIZE, Thing

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of the image


@dataclass(frozen=True)
class LayoutCase:
    """A prompt and, in the order in which it mentions them, its objects and where each belongs.

    phrases: each object alone, such as "a small striped red circle"; boxes: exact, as fractions
    of the image; background: of the scene that the boxes are from.
    """

    prompt: str
    things: tuple[Thing, ...]
    background: str

    @property
    def phrases(self) -> tuple[str, ...]:
        return tuple(describe(thing) for thing in self.things)

    @property
    def boxes(self) -> tuple[Box, ...]:
        made = []
        for thing in self.things:
            x0, y0, x1, y1 = (side / IMAGE_SIZE for side in thing.box)
            made.append((x0, y0, x1, y1))
        return tuple(made)


def draw_layout(rng: np.random.Generator, count: int, distinct: bool = True) -> LayoutCase:
    """A random held-out case of `count` objects; distinct: no two share a shape or a colour, so
    that every word means one object."""
    while True:
        scene, text = sample(rng, count, held_out=True)
        kinds = [{getattr(t, name) for t in scene.things} for name in ("shape", "colour")]
        if distinct and any(len(names) < count for names in kinds):
            continue
        by_name = {(t.shape, t.colour): t for t in scene.things}
        things = tuple(by_name[m.shape, m.colour] for m in parse(text).mentions)
        return LayoutCase(text, things, scene.background)


def found_in_place(detection: Detection, case: LayoutCase) -> list[Found | None]:
    """For each object of the case the one of its shape and colour that overlaps its box most
    (with an intersection over union above 0), or None."""
    found = []
    for thing, box in zip(case.things, case.boxes, strict=True):
        same = [o for o in detection.objects if (o.shape, o.colour) == (thing.shape, thing.colour)]
        best = max(same, key=lambda o: overlap(o, box), default=None)
        found.append(best if best is not None and overlap(best, box) > 0 else None)
    return found


def overlap(found: Found, box: Box) -> float:
    """Intersection over union of a found object's box and a box in fractions of the image."""
    a = [side / IMAGE_SIZE for side in found.box]
    width = min(a[2], box[2]) - max(a[0], box[0])
    height = min(a[3], box[3]) - max(a[1], box[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (a, box)]
    return width * height / (sum(areas) - width * height)
