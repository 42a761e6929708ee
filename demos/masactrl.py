"""MasaCtrl and StyleAligned on the embedded pipeline: one appearance, another layout.

MasaCtrl: the source is a striped object, the edit asks for it large and does not say that it is
striped. StyleAligned: another shape is asked for beside the first, and its stripes are not said
either. What is not said must come from the source. The plain pictures have the same noise and
prompts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import hookctl
from hookctl import show
from hookctl.demos.cost import counted
from hookctl.demos.shapes.captions import describe
from hookctl.demos.shapes.detect import detect
from hookctl.demos.shapes.world import COLOUR_NAMES, GROUND_NAMES, SHAPES, Thing
from hookctl.recipes import MasaCtrl, StyleAligned
from hookctl.recipes.batch import SourceAndEdits

STEPS, GUIDANCE, SHOWN = 25, 3.0, 3
LARGER = 1.25  # times the source's area
# The embedded UNet has its patterns in all of the decoder, not in its fine half alone.
SETTINGS: dict[str, dict[str, Any]] = {
    "MasaCtrl": {"start": 0.2, "sites": "self up"},
    "StyleAligned": {"shift": 1.0},
}
METHODS: dict[str, type[SourceAndEdits]] = {"MasaCtrl": MasaCtrl, "StyleAligned": StyleAligned}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Case:
    """The source's object and the one that the edit is to show."""

    source: Thing
    wanted: Thing
    prompts: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Outcome:
    case: Case
    source: Image.Image
    plain: Image.Image
    edited: Image.Image


def draw_case(method: str, rng: np.random.Generator) -> Case:
    """A striped object, and the same one large or another shape beside it, stripes unsaid."""
    shape, other = (str(s) for s in rng.permutation(SHAPES)[:2])
    colour, ground = str(rng.choice(COLOUR_NAMES)), str(rng.choice(GROUND_NAMES))
    source = Thing(shape, colour, "striped")
    said = Thing(shape, colour, size="large") if method == "MasaCtrl" else Thing(other, colour)
    wanted = Thing(said.shape, colour, "striped", said.size)
    first, second = (f"{describe(thing)} on a {ground} background" for thing in (source, said))
    return Case(source, wanted, (first, second))


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    begun, done = time.perf_counter(), 0
    outcomes: dict[str, list[Outcome]] = {name: [] for name in METHODS}
    costs: dict[str, Any] = {}
    for number, name in enumerate(METHODS):
        rng = np.random.default_rng([seed, 7, number])
        rows = 0
        for i in range(seeds):
            outcome, evaluated = edit_one(pipe, name, draw_case(name, rng), seed + 1000 * i)
            outcomes[name].append(outcome)
            rows, done = rows + evaluated, done + 1
            if progress is not None:
                progress(done, len(METHODS) * seeds)
        costs[name] = {"rows_per_case": rows / seeds, "rows_in_theory": 4 * STEPS}
    report = {
        "demo": "masactrl",
        "seed": seed,
        "cases_per_method": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": {name: figures(name, found) for name, found in outcomes.items()},
        "cost": costs,
        "wall_seconds": round(time.perf_counter() - begun, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    shown = [(name, o) for name, found in outcomes.items() for o in found[:SHOWN]]
    show.grid(
        [[o.source, o.plain, o.edited] for _, o in shown],
        column_titles=["source", "plain, same noise", "with the method"],
        row_titles=[f"{name}: {o.case.prompts[1]}" for name, o in shown],
        cell=(160, 160),
    ).save(out / "grid.png")
    return report


def edit_one(pipe: Any, name: str, case: Case, seed: int) -> tuple[Outcome, int]:
    """One case plainly and by a method, and how many rows the method's denoiser evaluated."""
    prompts = list(case.prompts)
    edit: Any = METHODS[name](prompts, **SETTINGS[name])
    common = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    source, plain = pipe(prompts, generator=edit.generators(seed), **common).images
    with counted(pipe.unet) as cost:
        _, edited = edit.run(pipe, seed=seed, **common)
    return Outcome(case, source, plain, edited), cost.rows


# -- what became of them ---------------------------------------------------------------------------


def figures(name: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """Over the cases whose source drew what its prompt says."""
    valid = [o for o in outcomes if _shows(o.source, o.case.source)]
    return {
        "cases_with_right_source": len(valid),
        "edit": _shares(name, [(o, o.edited) for o in valid]),
        "plain": _shares(name, [(o, o.plain) for o in valid]),
    }


def _shows(picture: Image.Image, thing: Thing) -> bool:
    found = detect(picture).find(thing.shape, thing.colour)
    return found is not None and found.pattern == thing.pattern


def _shares(name: str, pictures: list[tuple[Outcome, Image.Image]]) -> dict[str, float]:
    """appearance_kept: right shape, and colour and pattern of the source; layout_changed: larger
    than the source (MasaCtrl)."""
    if not pictures:
        return {}
    shares = {"appearance_kept": _mean(_shows(p, o.case.wanted) for o, p in pictures)}
    if name == "MasaCtrl":
        shares["layout_changed"] = _mean(_larger(o, p) for o, p in pictures)
    return shares


def _larger(outcome: Outcome, picture: Image.Image) -> bool:
    thing = outcome.case.source
    before, after = (detect(p).find(thing.shape, thing.colour) for p in (outcome.source, picture))
    return before is not None and after is not None and after.area >= LARGER * before.area


def _mean(flags: Any) -> float:
    return round(float(np.mean(list(flags))), 3)
