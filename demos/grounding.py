"""Instances at boxes, points, scribbles and masks, by a trained module: InstanceDiffusion.

UniFusion and ScaleU as they were trained on the frozen embedded denoiser, loaded from their file as
an official checkpoint is. Every format alone says where; the prompt is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hookctl.demos.layouts import LayoutCase, draw_layout
from hookctl.demos.placing import Progress, Stack, compare
from hookctl.demos.shapes.load import load_shapes
from hookctl.demos.shapes.world import IMAGE_SIZE, Thing
from hookctl.editor import Editor
from hookctl.learned import Instance, load

WEIGHTS = Path(__file__).parent / "shapes" / "weights" / "hooks" / "instances.safetensors"
STROKE = 6  # points of a scribble


def boxed(thing: Thing, caption: str) -> Instance:
    x0, y0, x1, y1 = (side / IMAGE_SIZE for side in thing.box)
    return Instance(caption, box=(x0, y0, x1, y1))


def pointed(thing: Thing, caption: str) -> Instance:
    x0, y0, x1, y1 = (side / IMAGE_SIZE for side in thing.box)
    return Instance(caption, point=((x0 + x1) / 2, (y0 + y1) / 2))


def scribbled(thing: Thing, caption: str) -> Instance:
    """A stroke through the middle of the object, from its left to its right."""
    mask = thing.mask()
    row = int(np.nonzero(mask)[0].mean())
    columns = np.nonzero(mask[row])[0]
    ends = np.linspace(columns.min() + 1, columns.max() - 1, STROKE)
    return Instance(caption, scribble=[(x / IMAGE_SIZE, row / IMAGE_SIZE) for x in ends])


def masked(thing: Thing, caption: str) -> Instance:
    return Instance(caption, mask=thing.mask())


Place = Callable[[Thing, str], Instance]


def grounded(cases: Sequence[LayoutCase], place: Place, **options: Any) -> list[Editor]:
    """The editor for some cases; options: of `InstanceDiffusion`."""
    instances = [
        [place(thing, caption) for thing, caption in zip(case.things, case.phrases, strict=True)]
        for case in cases
    ]
    return [load(WEIGHTS, load_shapes(), instances=instances, **options)]


METHODS: Mapping[str, Stack] = {
    "plain": lambda cases: [],
    "boxes": partial(grounded, place=boxed),
    "points": partial(grounded, place=pointed),
    "scribbles": partial(grounded, place=scribbled),
    "masks": partial(grounded, place=masked),
}


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    rng = np.random.default_rng([seed, 11])
    cases = [draw_layout(rng, 2 + i % 2) for i in range(seeds)]
    return compare("grounding", out, cases, METHODS, seed, progress)
