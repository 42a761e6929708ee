"""Real images recoloured on the flow-matching sibling, by the methods made for such models.

An image of the world with two objects is given, and asked for with one of them in another colour.
`asked anew` draws the new prompt from noise: what the model does without the image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl.demos.cases import EditCase, draw
from hookctl.demos.figures import EditFigures, measure, summary
from hookctl.demos.inversion import images_of
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import FireFlow, FlowEdit, RFInversion, RFSolver, UniEditFlow

STEPS, GUIDANCE, SHOWN = 25, 3.0, 4

Edit = Callable[[Any, Image.Image, EditCase, int], Image.Image]
Progress = Callable[[int, int], None]


def anew(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    made: Image.Image = pipe(
        case.target,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return made


def flow_edit(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    """Without an inversion: by what the two prompts want differently."""
    given: dict[str, Any] = {"steps": STEPS, "n_max": 17, "guidance": (2.0, 4.0), "seed": seed}
    edited: Image.Image = FlowEdit(pipe, image, [case.source, case.target], **given).run()[1]
    return edited


def inverted(recipe: Callable[..., Any], **settings: Any) -> Edit:
    """By an inversion under the image's prompt, and a path down under the edit's."""

    def edit(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
        given = {"source_prompt": case.source, "steps": STEPS, "guidance": GUIDANCE, **settings}
        edited: Image.Image = recipe(pipe, image, case.target, **given).run()[0]
        return edited

    return edit


METHODS: Mapping[str, Edit] = {
    "asked anew": anew,
    "FlowEdit": flow_edit,
    "RF-Inversion": inverted(RFInversion, eta=0.9, stop=0.3),
    "RF-Solver": inverted(RFSolver, inject=5),
    "FireFlow": inverted(FireFlow, inject=5),
    "UniEdit-Flow": inverted(UniEditFlow),
}


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe, started = hookctl.load_shapes(flow=True), time.perf_counter()
    rng = np.random.default_rng([seed, 9])
    cases = [draw("colour", rng) for _ in range(seeds)]
    images = images_of(cases, rng)
    drawn: dict[str, list[Image.Image]] = {}
    seconds = {}
    for done, (name, edit) in enumerate(METHODS.items(), 1):
        begun = time.perf_counter()
        drawn[name] = [
            edit(pipe, *given, seed + i) for i, given in enumerate(zip(images, cases, strict=True))
        ]
        seconds[name] = round((time.perf_counter() - begun) / seeds, 2)
        if progress is not None:
            progress(done, len(METHODS))
    report = {
        "demo": "flow",
        "model": "shapes-flow",
        "seed": seed,
        "cases": seeds,
        "steps": STEPS,
        "methods": {
            name: {**summary(_figures(cases, images, made)), "seconds_per_image": seconds[name]}
            for name, made in drawn.items()
        },
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    rows = [[images[i], *(made[i] for made in drawn.values())] for i in range(min(SHOWN, seeds))]
    grid = show.grid(
        rows,
        column_titles=["image", *drawn],
        row_titles=[case.title for case in cases[:SHOWN]],
        cell=(140, 140),
    )
    save_image(grid, out / "grid.png")
    return report


def _figures(
    cases: list[EditCase], images: list[Image.Image], made: list[Image.Image]
) -> list[EditFigures]:
    return [measure(*one) for one in zip(cases, images, made, strict=True)]
