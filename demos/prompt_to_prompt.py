"""Prompt-to-Prompt on the embedded pipeline: four kinds of edit, seen and measured.

Every case is drawn twice with the same noise: once by plainly asking for the edited prompt, once
under Prompt-to-Prompt. The detector then says whether the change is there and what else moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import hookctl
from hookctl.address.families import denoiser_of
from hookctl.demos.cases import EditCase, draw
from hookctl.demos.cost import FEW, counted, drawing_mib
from hookctl.demos.figures import EditFigures, measure, source_is_right, summary
from hookctl.demos.models import call_of, opened
from hookctl.demos.shapes.detect import detect
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import PromptToPrompt

KINDS = ("colour", "shape", "added word", "reweight")
STEPS, GUIDANCE = 25, 3.0
SHOWN = 2  # cases of each kind in the grid

# How much of the source each kind of edit holds on to.
SETTINGS: dict[str, dict[str, Any]] = {
    "colour": {"cross_replace": 0.8, "self_replace": 0.4, "self_resolution": 1.0},
    "shape": {"cross_replace": 0.8, "self_replace": 0.4, "self_resolution": 1.0},
    "added word": {"cross_replace": 0.8, "self_replace": 0.4, "self_resolution": 1.0},
    # Weighed to the end, traces are left of what goes.
    "reweight": {"cross_replace": 0.8, "self_replace": 0.0},
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One case: its images and figures; `valid` if the source drew what its prompt says."""

    case: EditCase
    seed: int
    source: Image.Image
    plain: Image.Image
    edited: Image.Image
    word_map: Image.Image
    valid: bool
    plain_figures: EditFigures
    edit_figures: EditFigures
    seconds: tuple[float, float]


def edit_one(pipe: Any, case: EditCase, seed: int, **settings: Any) -> Outcome:
    """Draw one case plainly and under control, and measure both."""
    prompts = [case.source, case.target]
    options = {"blend": case.words, **SETTINGS[case.kind], **case.options, **settings}
    edit = PromptToPrompt(prompts, **options)
    common = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **call_of(pipe)}
    started = time.perf_counter()
    source, plain = pipe(prompts, generator=edit.generators(seed), **common).images
    drawn = time.perf_counter()
    with hookctl.control(pipe, edit) as session:
        _, edited = pipe(prompts, generator=edit.generators(seed), **common).images
    done = time.perf_counter()
    # Of a word that is weighed away the edit has no map to be seen, but its source has.
    shown = int(case.after is not None)
    word = case.words[shown]
    word_map = session.maps[word].where(prompt=shown).overlay((source, edited)[shown], label=word)
    return Outcome(
        case,
        seed,
        source,
        plain,
        edited,
        word_map,
        source_is_right(case, detect(source)),
        measure(case, source, plain),
        measure(case, source, edited),
        (drawn - started, done - drawn),
    )


def run(
    out: Path,
    seed: int = 0,
    seeds: int = 4,
    progress: Progress | None = None,
    model: str = "shapes",
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = opened(model)
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    for kind in KINDS:
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        for i in range(seeds):
            outcomes.append(edit_one(pipe, draw(kind, rng), seed + i))
            if progress is not None:
                progress(len(outcomes), len(KINDS) * seeds)
    report = {
        "demo": "prompt_to_prompt",
        "model": model,
        "seed": seed,
        "cases_per_kind": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "kinds": {kind: _report([o for o in outcomes if o.case.kind == kind]) for kind in KINDS},
        "cost": _cost(pipe, outcomes[0].case),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    save_image(image(outcomes), out / "grid.png")
    return report


def _cost(pipe: Any, case: EditCase) -> dict[str, Any]:
    """Of a source and its edit in one batch, plainly and under control."""
    prompts = [case.source, case.target]
    edit = PromptToPrompt(prompts, **{"blend": case.words, **SETTINGS[case.kind], **case.options})
    costs = {}
    for name, editors in (("plain", ()), ("edit", (edit,))):
        with counted(denoiser_of(pipe)) as cost:
            peak = drawing_mib(pipe, prompts, *editors, guidance=GUIDANCE, **call_of(pipe))
        costs[name] = {
            "rows_per_step": cost.rows / FEW,
            "rows_in_theory": 2 * len(prompts),
            "peak_mib": peak,
        }
    return costs


def _report(outcomes: list[Outcome]) -> dict[str, Any]:
    """Figures over the cases whose source is right; an edit of a wrong source proves nothing."""
    valid = [o for o in outcomes if o.valid]
    return {
        "cases": len(outcomes),
        "cases_with_right_source": len(valid),
        "edit": summary([o.edit_figures for o in valid]),
        "plain_reprompt": summary([o.plain_figures for o in valid]),
        "seconds_edit": round(float(np.median([o.seconds[1] for o in outcomes])), 2),
        "seconds_plain": round(float(np.median([o.seconds[0] for o in outcomes])), 2),
    }


def image(outcomes: list[Outcome]) -> Image.Image:
    """The grid: source, plain re-prompt, edit and the edited word's map, a case a row."""
    rows, titles = [], []
    for kind in KINDS:
        cases = [o for o in outcomes if o.case.kind == kind]
        cases = ([o for o in cases if o.valid] + [o for o in cases if not o.valid])[:SHOWN]
        rows += [[o.source, o.plain, o.edited, o.word_map] for o in cases]
        titles += [o.case.title for o in cases]
    columns = ["source", "plain re-prompt, same seed", "Prompt-to-Prompt", "map of the word"]
    return show.grid(rows, column_titles=columns, row_titles=titles, cell=(160, 160))
