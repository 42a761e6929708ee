"""Two or three objects, each asked for in its own part of the image.

The canvas is divided among the objects of a held-out scene: each point belongs to the object whose
centre is nearest. Every scene is drawn plainly, under single ingredients (regional prompts, the
multi-instance sampler, layout guidance) and under two stacks, always from the same noise. An object
is right if one of its shape and colour lies in its part; a part has leaked if an object there has
the colour or the shape of another one of the scene.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hookctl import Editor
from hookctl.demos.layouts import LayoutCase, draw_layout
from hookctl.demos.models import SHAPES_FLOW, opened
from hookctl.demos.placing import (
    BATCH,
    STEPS,
    Progress,
    Stack,
    cost_of,
    draw,
    peak,
    sheet,
    words,
    write_up,
)
from hookctl.demos.shapes.detect import detect
from hookctl.demos.shapes.world import BACKGROUNDS, COLOURS, IMAGE_SIZE
from hookctl.recipes import (
    LayoutGuidance,
    MaskedSelfAttention,
    MultiInstanceSampler,
    RegionalPrompts,
)

SHARE = 0.5  # of the schedule in which the sampler draws the objects apart
LATER = (0.28, 0.6)  # and in which it does so under layout guidance
# Regions are said apart while the layout forms: to the end, this small model, whose images are of
# one scene, leaves objects out.
ALONE = 0.3
# A region that hears of its object alone, beside others, tends to leave it out: in stacks the whole
# prompt keeps half of each region.
BASE = 0.5

Part = NDArray[np.bool_]


def parts(case: LayoutCase) -> list[Part]:
    """The canvas divided among the objects: bool [height, width] for each."""
    pixel = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in case.boxes]
    far = np.stack([(pixel[None] - x) ** 2 + (pixel[:, None] - y) ** 2 for x, y in centres])
    nearest = far.argmin(0)
    return [nearest == i for i in range(len(centres))]


def texts(case: LayoutCase) -> list[str]:
    return [f"{phrase} on a {case.background} background" for phrase in case.phrases]


def regional(cases: Sequence[LayoutCase], **settings: Any) -> list[Editor]:
    places = [parts(case) for case in cases]
    return [RegionalPrompts([texts(c) for c in cases], places, **{"base": 0.0, **settings})]


def masked(cases: Sequence[LayoutCase], **settings: Any) -> list[Editor]:
    """Boxes are cut off from one another but see the background: objects that see none fade."""
    boxes = [case.boxes for case in cases]
    return [MaskedSelfAttention(boxes, background="all", open=True, **settings)]


def guided(cases: Sequence[LayoutCase]) -> list[Editor]:
    places = [parts(case) for case in cases]
    return [LayoutGuidance(words(cases), places, scale=60.0, stop=0.4)]


def sampled(cases: Sequence[LayoutCase], **settings: Any) -> list[Editor]:
    """Each phrase is asked for in its own part alone: asked for everywhere, objects come to stand
    across a part's edge, where the merge cuts them."""
    return [
        MultiInstanceSampler(
            [texts(c) for c in cases],
            [parts(c) for c in cases],
            merge="paste",
            background=[BACKGROUNDS[c.background] for c in cases],
            **{"share": SHARE, "outside": "", **settings},
        )
    ]


def sampled_and_masked(cases: Sequence[LayoutCase]) -> list[Editor]:
    """The sampler places the objects; from the merge on the others keep them apart."""
    return [
        *sampled(cases),
        *regional(cases, base=BASE, start=SHARE),
        *masked(cases, start=SHARE),
    ]


def placed(cases: Sequence[LayoutCase]) -> list[Editor]:
    """Instances get images of their own once guidance has laid out the whole one: their phrases
    need no place."""
    start, share = LATER
    return [*guided(cases), *sampled(cases, start=start, share=share, outside=None)]


METHODS: Mapping[str, Stack] = {
    "plain": lambda cases: [],
    "regional prompts": lambda cases: regional(cases, stop=ALONE),
    "sampler": sampled,
    "sampler + regional + masked": sampled_and_masked,
    "layout guidance": guided,
    "layout guidance + sampler": placed,
}
# On "shapes-flow" a region that hears of its object alone keeps it, to the end.
ON_FLOW: Mapping[str, Stack] = {
    **METHODS,
    "regional prompts": lambda cases: regional(cases, base=0.3, edge=0.1),
}


def run(
    out: Path,
    seed: int = 0,
    seeds: int = 4,
    progress: Progress | None = None,
    model: str = "shapes",
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    pipe, started = opened(model), time.perf_counter()
    rng = np.random.default_rng([seed, 4])
    cases = [draw_layout(rng, 2 + i % 2) for i in range(seeds)]
    drawn: dict[str, Sequence[Image.Image]] = {}
    costs: dict[str, Any] = {}
    methods = ON_FLOW if model == SHAPES_FLOW else METHODS
    for done, (name, stack) in enumerate(methods.items(), 1):
        made = draw(pipe, cases, stack, seed)
        drawn[name] = made.images
        costs[name] = cost_of(made, theory(name, cases))
        costs[name]["peak_mib_of_an_image"] = peak(pipe, cases[0], stack)
        if progress is not None:
            progress(done, len(methods))
    measured = {name: figures(cases, images) for name, images in drawn.items()}
    report = write_up("regional", out, seed, len(cases), measured, costs, started, model)
    sheet(out, cases, drawn, layout)
    return report


def theory(name: str, cases: Sequence[LayoutCase]) -> float:
    """Denoiser rows for an image: two in each step, and two for each instance while it is apart.

    A batch asks for as many instances as its fullest image has.
    """
    start, share = LATER if name == "layout guidance + sampler" else (0.0, SHARE)
    steps = int(share * STEPS + 1e-9) - int(start * STEPS + 1e-9) if "sampler" in name else 0
    batches = [cases[i : i + BATCH] for i in range(0, len(cases), BATCH)]
    instances = sum(len(b) * max(len(case.things) for case in b) for b in batches) / len(cases)
    return 2.0 * STEPS + 2 * instances * steps


# -- what became of them ---------------------------------------------------------------------------


def figures(cases: Sequence[LayoutCase], images: Sequence[Image.Image]) -> dict[str, float]:
    """right, leaked: shares of all objects and of all parts; whole: of images in which every
    object is right and nothing leaked; surplus: objects and blobs beyond those asked for."""
    right, leaked, whole, surplus = [], [], [], []
    for case, drawn in zip(cases, images, strict=True):
        detection = detect(drawn)
        here = []
        for part, thing in zip(parts(case), case.things, strict=True):
            inside = [o for o in detection.objects if part[int(o.centre[1]), int(o.centre[0])]]
            others = [t for t in case.things if t is not thing]
            alien = {t.shape for t in others} | {t.colour for t in others}
            fits = any((o.shape, o.colour) == (thing.shape, thing.colour) for o in inside)
            leaks = any({o.shape, o.colour} & alien for o in inside)
            here.append((fits, leaks))
        right += [fits for fits, _ in here]
        leaked += [leaks for _, leaks in here]
        whole.append(all(fits and not leaks for fits, leaks in here))
        surplus.append(len(detection.objects) + len(detection.extras) - len(case.things))
    return {
        "right": round(float(np.mean(right)), 3),
        "leaked": round(float(np.mean(leaked)), 3),
        "whole": round(float(np.mean(whole)), 3),
        "surplus": round(float(np.mean(surplus)), 2),
    }


def layout(case: LayoutCase) -> Image.Image:
    """The parts as flat tints of their objects' colours, with the boxes of the scene."""
    tints = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for part, thing in zip(parts(case), case.things, strict=True):
        tints[part] = np.array(COLOURS[thing.colour]) // 2 + 110
        x0, y0, x1, y1 = (int(side) for side in thing.box)
        tints[y0:y1, x0:x1] = COLOURS[thing.colour]
    return Image.fromarray(tints)
