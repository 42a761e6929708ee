"""Instances at boxes, points, scribbles and masks, by a trained module: InstanceDiffusion.

UniFusion and ScaleU as they were trained on the frozen embedded denoiser, loaded from their file as
an official checkpoint is. Every format alone says where; then the prompt leaves the instances to
their captions, the multi-instance sampler and masked self-attention join in, and RealCompo takes
the grounded model for its layout model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import hookctl
from hookctl.demos.layouts import LayoutCase, draw_layout, overlap
from hookctl.demos.placing import (
    BATCH,
    IN_PLACE,
    STEPS,
    Drawn,
    Progress,
    Stack,
    boxes,
    cost_of,
    draw,
    layout,
    named,
    peak,
    placed,
    sheet,
    words,
    write_up,
)
from hookctl.demos.shapes.detect import Found, detect
from hookctl.demos.shapes.load import load_shapes
from hookctl.demos.shapes.world import IMAGE_SIZE, Thing
from hookctl.editor import Editor
from hookctl.learned import Instance, load
from hookctl.recipes import MultiInstanceSampler, RealCompo

WEIGHTS = Path(__file__).parent / "shapes" / "weights" / "hooks" / "instances.safetensors"
STROKE = 6  # points of a scribble
ON_IT = 0.8  # of a stroke that must lie on its object
APART = 0.36  # of the schedule in which the sampler draws instances alone, as in its official code


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


@cache
def pipeline() -> Any:
    return load_shapes()


def grounded(cases: Sequence[LayoutCase], place: Place = boxed, **options: Any) -> list[Editor]:
    """The editor for some cases; options: of `InstanceDiffusion`."""
    instances = [
        [place(thing, caption) for thing, caption in zip(case.things, case.phrases, strict=True)]
        for case in cases
    ]
    return [load(WEIGHTS, pipeline(), instances=instances, **options)]


def sampled(cases: Sequence[LayoutCase]) -> list[Editor]:
    """Each instance alone at first, grounded by itself, as in the paper."""
    phrases = [list(case.phrases) for case in cases]
    return [MultiInstanceSampler(phrases, boxes(cases), share=APART), *grounded(cases)]


def mixed(cases: Sequence[LayoutCase], seed: int) -> Drawn:
    """RealCompo of the plain model and a second pipeline over the same weights, which is grounded:
    the paper's own setting."""
    pipe = pipeline()
    layout_model = type(pipe)(**pipe.components, requires_safety_checker=False)
    layout_model.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    rows = part = 0.0
    for i in range(0, len(cases), BATCH):
        some = cases[i : i + BATCH]

        def stack(cases: Sequence[LayoutCase]) -> list[Editor]:
            return [RealCompo(words(cases), boxes(cases), layout_model)]

        with hookctl.control(layout_model, *grounded(some)):
            made = draw(pipe, some, stack, seed + i, read=False)
        images += made.images
        share = len(some) / len(cases)
        # An update reads the maps of both models.
        rows, part = rows + share * made.rows, part + share * 2 * made.partial
    return Drawn(images, [], [], [], rows, part)


METHODS: Mapping[str, Stack] = {
    "plain": lambda cases: [],
    "boxes": grounded,
    "points": partial(grounded, place=pointed),
    "scribbles": partial(grounded, place=scribbled),
    "masks": partial(grounded, place=masked),
    "boxes, seen apart": partial(grounded, masked=True),
    "boxes + sampler": sampled,
}
SILENT, MIXED = "boxes, no prompt", "RealCompo of boxes"


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    pipe, started = pipeline(), time.perf_counter()
    rng = np.random.default_rng([seed, 11])
    cases = [draw_layout(rng, 2 + i % 2) for i in range(seeds)]
    silent = [replace(case, prompt="") for case in cases]
    runs: dict[str, Callable[[], Drawn]] = {
        name: partial(draw, pipe, cases, stack, seed, read=False) for name, stack in METHODS.items()
    }
    runs[SILENT] = partial(draw, pipe, silent, grounded, seed, read=False)
    runs[MIXED] = partial(mixed, cases, seed)
    drawn: dict[str, Drawn] = {}
    for done, (name, made) in enumerate(runs.items(), 1):
        drawn[name] = made()
        if progress is not None:
            progress(done, len(runs))
    figures = {name: measured(cases, one.images, name) for name, one in drawn.items()}
    costs = {name: cost_of(one, theory(name, cases)) for name, one in drawn.items()}
    for name, stack in METHODS.items():
        costs[name]["peak_mib_of_an_image"] = peak(pipe, cases[0], stack)
    report = write_up("grounding", out, seed, len(cases), figures, costs, started)
    sheet(out, cases, {name: one.images for name, one in drawn.items()}, layout)
    return report


def theory(name: str, cases: Sequence[LayoutCase]) -> float:
    """Rows of whole denoiser calls for an image: two a step, as many for each further model, and
    two for each instance while it is drawn alone."""
    if name == MIXED:
        return 4.0 * STEPS
    batches = [cases[i : i + BATCH] for i in range(0, len(cases), BATCH)]
    instances = sum(len(b) * max(len(case.things) for case in b) for b in batches) / len(cases)
    steps = int(APART * STEPS + 1e-9) if "sampler" in name else 0
    return 2.0 * STEPS + 2 * instances * steps


# -- what became of them ---------------------------------------------------------------------------


def measured(
    cases: Sequence[LayoutCase], images: Sequence[Image.Image], name: str
) -> dict[str, float]:
    """Figures of `placing`, and right: share of the objects of which one of their shape and colour
    is somewhere; on_place: of which it lies where the instance is said to be; leaked: share of the
    boxes in which there is one with another object's colour or shape."""
    right, there, leaked = [], [], []
    for case, image in zip(cases, images, strict=True):
        detection = detect(image)
        for thing, box in zip(case.things, case.boxes, strict=True):
            kind = thing.shape, thing.colour
            same = [o for o in detection.objects if (o.shape, o.colour) == kind]
            right.append(bool(same))
            there.append(any(lies_on(one, thing, name) for one in same))
            inside = [o for o in detection.objects if overlap(o, box) >= IN_PLACE]
            others = {n for t in case.things if t is not thing for n in (t.shape, t.colour)}
            alien = others - {*kind}
            leaked.append(any({o.shape, o.colour} & alien for o in inside))
    shares = {"right": right, "on_place": there, "leaked": leaked}
    means = {key: round(float(np.mean(one)), 3) for key, one in shares.items()}
    return placed(cases, images) | named(cases, images) | means


def lies_on(found: Found, thing: Thing, name: str) -> bool:
    """Whether an object is where a method was told: it covers the point, most of the stroke, or
    half of what it and the box or mask cover together."""
    if name == "points":
        x, y = pointed(thing, "").point or (0.0, 0.0)
        return bool(found.mask[int(y * IMAGE_SIZE), int(x * IMAGE_SIZE)])
    if name == "scribbles":
        stroke = scribbled(thing, "").scribble or ()
        on = [found.mask[int(y * IMAGE_SIZE), int(x * IMAGE_SIZE)] for x, y in stroke]
        return float(np.mean(on)) >= ON_IT
    if name == "masks":
        mask = thing.mask()
        return float((found.mask & mask).sum() / (found.mask | mask).sum()) >= 0.5
    x0, y0, x1, y1 = (side / IMAGE_SIZE for side in thing.box)
    return overlap(found, (x0, y0, x1, y1)) >= 0.5
