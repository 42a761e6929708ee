"""MasaCtrl, StyleAligned and reference-only: one appearance, another layout.

MasaCtrl: the source is an object on a background, the edit asks for it in another size.
StyleAligned: the others of a set have other shapes. Reference-only: the same, with the first image
given, rendered from the world. Only the first prompt names the background: the other images must
take it from the first. The plain images have the same noise and prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hookctl.address.families import denoiser_of
from hookctl.demos.cost import counted, drawing_mib
from hookctl.demos.models import SHAPES_FLOW, call_of, opened
from hookctl.demos.shapes.captions import describe
from hookctl.demos.shapes.detect import Detection, Found, detect
from hookctl.demos.shapes.render import drawn
from hookctl.demos.shapes.world import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    PATTERNS,
    SHAPES,
    SPACING,
    Scene,
    Thing,
)
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import MasaCtrl, ReferenceOnly, StyleAligned
from hookctl.recipes.common.source_and_edits import SourceAndEdits

STEPS, GUIDANCE, SHOWN = 25, 3.0, 3
ELSEWHERE = 0.5  # intersection over union with the source's object below which the layout is new
# The embedded UNet has its patterns in all of the decoder, not in its fine half.
SITES = "self up, joint"
REFERENCE = "reference-only"  # whose first image is given
Make = Callable[["Case"], SourceAndEdits]
METHODS: dict[str, Make] = {
    "MasaCtrl": lambda case: MasaCtrl(case.prompts, sites=SITES),
    "StyleAligned": lambda case: StyleAligned(case.prompts),
    REFERENCE: lambda case: ReferenceOnly(case.prompts, case.image()),
}
# Of the six blocks of "shapes-flow" the first three settle the background; sharing in the others
# breaks shapes, as aligned queries do.
FIRST = [f"transformer_blocks.{i}.attn" for i in range(3)]
ON_FLOW: dict[str, Make] = {
    "MasaCtrl": lambda case: MasaCtrl(case.prompts, sites=FIRST, stop=0.5),
    "StyleAligned": lambda case: StyleAligned(case.prompts, adain=False, sites=FIRST),
    REFERENCE: lambda case: ReferenceOnly(case.prompts, case.image(), sites=FIRST),
}
NOISES = {"MasaCtrl": 4, "StyleAligned": 2, REFERENCE: 2}  # drawn at once of every case

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Case:
    """What the first image is to show, and what its edits are to, all on one background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def prompts(self) -> list[str]:
        first, *others = map(describe, self.things)
        return [f"{first} on a {self.background} background", *others]

    def image(self) -> Image.Image:
        """The first image as the world has it."""
        return drawn([Scene(self.things[:1], self.background)])[0]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One noise of a case: the first image, and its edits without and with the method."""

    case: Case
    source: Image.Image
    plain: list[Image.Image]
    edited: list[Image.Image]


def draw_case(method: str, rng: np.random.Generator) -> Case:
    """An object and the same one in another size, or two of other shapes."""
    shapes = [str(shape) for shape in rng.permutation(SHAPES)[:3]]
    colour, pattern, background = (
        str(rng.choice(names)) for names in (COLOUR_NAMES, PATTERNS, BACKGROUND_NAMES)
    )
    if method != "MasaCtrl":
        things = [Thing(shape, colour, pattern) for shape in shapes]
        if method == REFERENCE:
            x, y = (SPACING * int(n) for n in rng.integers(3, 6, 2))
            things[0] = replace(things[0], centre=(x, y))
        return Case(tuple(things), background)
    sizes = rng.permutation(("small", "large"))
    return Case(tuple(Thing(shapes[0], colour, pattern, str(size)) for size in sizes), background)


def run(
    out: Path,
    seed: int = 0,
    seeds: int = 4,
    progress: Progress | None = None,
    model: str = "shapes",
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report.

    seeds: pairs of source and edit for MasaCtrl; half as many sets of three for the others.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipe, started = opened(model), time.perf_counter()
    outcomes: dict[str, list[Outcome]] = {}
    costs: dict[str, Any] = {}
    methods = ON_FLOW if model == SHAPES_FLOW else METHODS
    for number, (name, make) in enumerate(methods.items()):
        count = seeds if name == "MasaCtrl" else (seeds + 1) // 2
        found: list[Outcome] = []
        rng, rows = np.random.default_rng([seed, 7, number]), 0
        while len(found) < count:
            images = min(NOISES[name], count - len(found))
            some, evaluated = edit(
                pipe, name, make, draw_case(name, rng), seed + 1000 * len(found), images
            )
            found, rows = found + some, rows + evaluated
        images = sum(1 + len(o.edited) for o in found)
        outcomes[name] = found
        costs[name] = {
            "rows_per_image": rows / images,
            "rows_in_theory": 2 * STEPS,
            **_peaks(pipe, make, found[0].case),
        }
        if progress is not None:
            progress(number + 1, len(methods))
    report = {
        "demo": "masactrl",
        "model": model,
        "seed": seed,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": {name: appearances(found) for name, found in outcomes.items()},
        "cost": costs,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    save_image(image(outcomes), out / "grid.png")
    return report


def _peaks(pipe: Any, make: Make, case: Case) -> dict[str, float]:
    """Of all the images of a case, drawn in one batch."""
    prompts, editor = list(case.prompts), make(case)
    return {
        "peak_mib_of_a_set": drawing_mib(pipe, prompts, editor, guidance=GUIDANCE, **call_of(pipe)),
        "peak_mib_of_a_set_plainly": drawing_mib(pipe, prompts, guidance=GUIDANCE, **call_of(pipe)),
    }


def edit(
    pipe: Any, name: str, make: Make, case: Case, seed: int, images: int
) -> tuple[list[Outcome], int]:
    """A case plainly and by a method, and how many rows the method's denoiser evaluated."""
    editor = make(case)
    common = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **call_of(pipe)}
    plain = pipe(
        case.prompts,
        num_images_per_prompt=images,
        generator=editor.generators(seed, images),
        **common,
    ).images
    with counted(denoiser_of(pipe)) as cost:
        edited = editor.run(pipe, seed=seed, images=images, **common)
    sources = [case.image()] * images if name == REFERENCE else plain[:images]
    return [
        Outcome(case, source, plain[images + j :: images], edited[images + j :: images])
        for j, source in enumerate(sources)
    ], cost.rows


# -- what became of them ---------------------------------------------------------------------------


def appearances(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Over the cases whose first image shows what its prompt says."""
    valid = [o for o in outcomes if _source(o) is not None]
    return {
        "cases": len(outcomes),
        "cases_with_right_source": len(valid),
        "edit": _shares([list(_read(o, o.edited)) for o in valid]),
        "plain": _shares([list(_read(o, o.plain)) for o in valid]),
    }


def _shown(detection: Detection, thing: Thing, background: str) -> Found | None:
    """The object, if it is there in its colour and pattern and stands on the background."""
    found = detection.find(thing.shape, thing.colour)
    right = found is not None and (found.pattern, detection.background) == (
        thing.pattern,
        background,
    )
    return found if right else None


def _source(outcome: Outcome) -> Found | None:
    return _shown(detect(outcome.source), outcome.case.things[0], outcome.case.background)


def _read(outcome: Outcome, images: Sequence[Image.Image]) -> Iterator[tuple[bool, bool, int]]:
    """(appearance kept, and layout new as well, things beside the object) for every edit."""
    source = _source(outcome)
    assert source is not None  # the case is valid
    for thing, made in zip(outcome.case.things[1:], images, strict=True):
        detection = detect(made)
        found = _shown(detection, thing, outcome.case.background)
        there = len(detection.objects) + len(detection.extras)
        yield found is not None, found is not None and _elsewhere(source, found), max(there - 1, 0)


def _elsewhere(a: Found, b: Found) -> bool:
    both, either = (a.mask & b.mask).sum(), (a.mask | b.mask).sum()
    return bool(both < ELSEWHERE * either)


def _shares(cases: Sequence[Sequence[tuple[bool, bool, int]]]) -> dict[str, float]:
    """appearance_kept: share of the edits with the shape asked for and the first image's colour,
    pattern and background; with_new_layout: that cover the source's object by less than half as
    well; consistent_sets: of the cases whose edits all kept the appearance; surplus: objects and
    blobs beside the one asked for, in an image."""
    if not cases:
        return {}
    edits = np.array([one for case in cases for one in case], float)
    whole = np.mean([all(kept for kept, *_ in case) for case in cases])
    return {
        "appearance_kept": round(float(edits[:, 0].mean()), 3),
        "with_new_layout": round(float(edits[:, 1].mean()), 3),
        "consistent_sets": round(float(whole), 3),
        "surplus": round(float(edits[:, 2].mean()), 2),
    }


def image(outcomes: dict[str, list[Outcome]]) -> Image.Image:
    """The grid: the first image, then its edits without and with the method, a case a row."""
    rows, titles = [], []
    for name, found in outcomes.items():
        for one in found[:: NOISES[name]][:SHOWN]:
            rows.append([one.source, *_two(one.plain), *_two(one.edited)])
            titles.append(f"{name}: {'; '.join(one.case.prompts)}")
    columns = ["source", "edit 1, plain", "edit 2, plain", "edit 1, method", "edit 2, method"]
    return show.grid(rows, column_titles=columns, row_titles=titles, cell=(128, 128))


def _two(images: Sequence[Image.Image]) -> list[Image.Image | None]:
    return [*images, None][:2]
