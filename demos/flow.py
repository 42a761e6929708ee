"""Real images recoloured on the flow-matching sibling, by the methods made for such models.

The images are rendered from the world, not drawn by the model, and hold two objects. One is asked
for in another colour; the other and the background are to stay. `asked anew` draws the new caption
from noise: what the model does without the image.

Settings were chosen on cases of other seeds (1000 and on) than those that are reported.
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
from hookctl.demos.figures import background_psnr, measure, summary
from hookctl.demos.inversion import images_of
from hookctl.demos.shapes.detect import detect
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.loop.images import decode, encode
from hookctl.recipes import (
    FireFlow,
    FlowEdit,
    KVEdit,
    RFInversion,
    RFSolver,
    StableFlow,
    UniEditFlow,
)

STEPS, FEW, GUIDANCE, SHOWN = 25, 15, 3.0, 4
MARGIN = 0.03  # of the image, round the object that KV-Edit may change
# The model was trained with and without the empty tokens of a T5 that it lacks.
ARGUMENTS: dict[str, Any] = {"max_sequence_length": 0}
# Inversions end in other noise than the model draws from: it was trained mostly far from images.
UNIT: dict[str, Any] = {"unit_noise": True}
# `vital_sites(pipe, captions)`: the one block of six without which all else changes.
VITAL = ["transformer_blocks.0.attn"]
LENDING = [*VITAL, "transformer_blocks.1.attn", "transformer_blocks.2.attn"]


Edit = Callable[[Any, Image.Image, EditCase, int], Image.Image]
Progress = Callable[[int, int], None]


def anew(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    made: Image.Image = pipe(
        case.target,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        **ARGUMENTS,
    ).images[0]
    return made


def flow_edit(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    """Without an inversion: by what the two prompts want differently."""
    given: dict[str, Any] = {"steps": STEPS, "n_max": 12, "guidance": (1.5, 5.5), "seed": seed}
    prompts = [case.source, case.target]
    edited: Image.Image = FlowEdit(pipe, image, prompts, arguments=ARGUMENTS, **given).run()[1]
    return edited


def rf_inversion(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    """Pulled to fixed noise on the way up, and to the image on the way down."""
    given: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "eta": 0.9, "stop": 0.6}
    edit = RFInversion(pipe, image, case.target, seed=seed, arguments=ARGUMENTS, **given)
    edited: Image.Image = edit.run()[0]
    return edited


def by_inversion(recipe: Callable[..., Any], **settings: Any) -> Edit:
    """Up under the image's caption and down under the edit's."""

    def edit(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
        given = {"source_prompt": case.source, "arguments": ARGUMENTS, **settings}
        edited: Image.Image = recipe(pipe, image, case.target, **given).run()[0]
        return edited

    return edit


def kv_edit(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    """In the box of the object; the rest is keys and values alone."""
    given: dict[str, Any] = {"steps": STEPS, "skip": 12, "guidance": 8.0, "seed": seed}
    edit = KVEdit(
        pipe,
        image,
        case.target,
        box_of(image, case),
        source_prompt=case.source,
        inversion=False,
        arguments=ARGUMENTS,
        **given,
    )
    edited: Image.Image = edit.run()[0]
    return edited


def box_of(image: Image.Image, case: EditCase) -> tuple[float, float, float, float]:
    """Of the object that changes and a margin: (left, top, right, bottom), shares of the image."""
    found = detect(image).find(*case.before[:2])
    assert found is not None  # it was rendered so
    y, x = np.nonzero(found.mask)
    height, width = found.mask.shape
    left, top = x.min() / width - MARGIN, y.min() / height - MARGIN
    right, bottom = (x.max() + 1) / width + MARGIN, (y.max() + 1) / height + MARGIN
    return max(0.0, left), max(0.0, top), min(1.0, right), min(1.0, bottom)


def stable_flow(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    """Drawn beside the inverted image, whose keys and values the early layers have at first."""
    edit = StableFlow([case.source, case.target], sites=LENDING, stop=0.5)
    given: dict[str, Any] = {"steps": FEW, "guidance": GUIDANCE, "nudge": 1.0, **UNIT}
    edited: Image.Image = edit.edit(pipe, image, arguments=ARGUMENTS, **given)[1]
    return edited


METHODS: Mapping[str, Edit] = {
    "asked anew": anew,
    "FlowEdit": flow_edit,
    "RF-Inversion": rf_inversion,
    "KV-Edit": kv_edit,
    "Stable Flow": stable_flow,
    "RF-Solver": by_inversion(RFSolver, steps=FEW, guidance=1.0, inject=2, **UNIT),
    "FireFlow": by_inversion(FireFlow, steps=FEW, guidance=2.0, inject=1, **UNIT),
    "UniEdit-Flow": by_inversion(UniEditFlow, steps=STEPS, alpha=0.8, omega=0.1, **UNIT),
}


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe, started = hookctl.load_shapes(flow=True), time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng([seed, 9])
    cases = [draw("colour", rng) for _ in range(seeds)]
    images = images_of(cases, rng)
    drawn: dict[str, list[Image.Image]] = {}
    methods: dict[str, Any] = {}
    for done, (name, edit) in enumerate(METHODS.items(), 1):
        begun = time.perf_counter()
        pairs = list(zip(images, cases, strict=True))
        drawn[name] = [edit(pipe, *pair, seed + i) for i, pair in enumerate(pairs)]
        seconds = round((time.perf_counter() - begun) / seeds, 2)
        found = [measure(*one) for one in zip(cases, images, drawn[name], strict=True)]
        both = float(np.mean([one.edit_success and one.kept for one in found]))
        methods[name] = {**summary(found), "both": round(both, 4), "seconds_per_image": seconds}
        if progress is not None:
            progress(done, len(METHODS))
    again = [decode(pipe, encode(pipe, image))[0] for image in images]
    lost = [background_psnr(*pair, []) for pair in zip(images, again, strict=True)]
    report = {
        "demo": "flow",
        "model": "shapes-flow",
        "seed": seed,
        "cases": seeds,
        "autoencoder_psnr": round(float(np.mean(lost)), 2),
        "methods": methods,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    rows = [[images[i], *(made[i] for made in drawn.values())] for i in range(min(SHOWN, seeds))]
    grid = show.grid(
        rows,
        column_titles=["image", *drawn],
        row_titles=[case.title for case in cases[:SHOWN]],
        cell=(128, 128),
    )
    save_image(grid, out / "grid.png")
    return report
