"""MultiDiffusion on the embedded pipeline: canvases three times as wide as its images.

Each canvas has one object in each third, on one background. It is drawn by MultiDiffusion with a
region for each third, by tiles of one prompt alone, by asking for the wide canvas plainly, and as
three images side by side. A seam is where the gradient across the borders of the thirds is
greater than elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl.demos.cost import counted, drawing_mib
from hookctl.demos.layouts import draw_layout
from hookctl.demos.shapes.captions import describe
from hookctl.demos.shapes.detect import detect
from hookctl.demos.shapes.world import IMAGE_SIZE, Thing
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import MultiDiffusion

STEPS, GUIDANCE, STRIDE, BATCH = 25, 3.0, 8, 8
# Under regions a tile is one region: in one that holds parts of two, this model draws an object for
# each part, which the border of the region cuts.
OF_A_REGION = 16
WIDTH = 3 * IMAGE_SIZE
THIRDS = [(i / 3, 0.0, (i + 1) / 3, 1.0) for i in range(3)]
SHOWN = 3

# Denoiser rows in a step for a canvas, in images: 3 tiles of a region each, or 5 that overlap.
ROWS = {"regions": 2 * 3, "tiles": 2 * 5, "plain, wide": 2 * 3, "side by side": 2 * 3}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Canvas:
    """Three objects from left to right, and their background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def texts(self) -> list[str]:
        return [f"{describe(thing)} on a {self.background} background" for thing in self.things]

    @property
    def prompt(self) -> str:
        a, b, c = (describe(thing) for thing in self.things)
        return f"{a}, {b} and {c} on a {self.background} background"


def canvases(seed: int, count: int) -> list[Canvas]:
    rng = np.random.default_rng([seed, 2])
    cases = [draw_layout(rng, 3) for _ in range(count)]
    return [Canvas(case.things, case.background) for case in cases]


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    cases = canvases(seed, seeds)
    run_started = time.perf_counter()
    drawn: dict[str, list[Image.Image]] = {}
    costs: dict[str, Any] = {}
    for i, (name, method) in enumerate(METHODS.items(), 1):
        with counted(pipe.unet) as cost:
            started = time.perf_counter()
            drawn[name] = method(pipe, cases, seed)
            seconds = time.perf_counter() - started
        costs[name] = {
            "image_rows_per_canvas": round(cost.images / len(cases), 2),
            "image_rows_in_theory": ROWS[name] * STEPS,
            "seconds_per_canvas": round(seconds / len(cases), 2),
            "peak_mib_of_a_canvas": _peak(pipe, name, cases[0]),
        }
        if progress is not None:
            progress(i, len(METHODS))
    report = {
        "demo": "multi_diffusion",
        "seed": seed,
        "canvases": len(cases),
        "size": f"{WIDTH} x {IMAGE_SIZE} px",
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": {name: figures(cases, images) for name, images in drawn.items()},
        "cost": costs,
        "wall_seconds": round(time.perf_counter() - run_started, 1),
    }
    write_json(out / "report.json", report)
    save_image(image(cases, drawn), out / "grid.png")
    return report


# -- the methods -----------------------------------------------------------------------------------


def _noises(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def _wide(edit: MultiDiffusion | None, pipe: Any, prompts: list[str], seed: int) -> Any:
    given: dict[str, Any] = {
        "height": IMAGE_SIZE,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "generator": _noises(seed, len(prompts)),
    }
    if edit is None:
        return pipe(prompts, **given).images
    return edit.run(pipe, prompts, **given)


def _regions(cases: list[Canvas], seed: int) -> MultiDiffusion:
    return MultiDiffusion(
        [case.texts for case in cases], [THIRDS] * len(cases), stride=OF_A_REGION, seed=seed
    )


def regions(pipe: Any, cases: list[Canvas], seed: int) -> list[Image.Image]:
    """A region for each third."""
    return list(_wide(_regions(cases, seed), pipe, [case.prompt for case in cases], seed))


def tiles(pipe: Any, cases: list[Canvas], seed: int) -> list[Image.Image]:
    """A panorama of one prompt."""
    edit = MultiDiffusion(stride=STRIDE)
    return list(_wide(edit, pipe, [case.prompt for case in cases], seed))


def plain(pipe: Any, cases: list[Canvas], seed: int) -> list[Image.Image]:
    """The wide canvas, as the pipeline itself draws it."""
    return list(_wide(None, pipe, [case.prompt for case in cases], seed))


def side_by_side(pipe: Any, cases: list[Canvas], seed: int) -> list[Image.Image]:
    """Each third an image of its own."""
    texts = [text for case in cases for text in case.texts]
    thirds = []
    for i in range(0, len(texts), BATCH):
        part = texts[i : i + BATCH]
        thirds += pipe(
            part,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=_noises(seed + i, len(part)),
        ).images
    made = []
    for i in range(0, len(thirds), 3):
        canvas = Image.new("RGB", (WIDTH, IMAGE_SIZE))
        for k, third in enumerate(thirds[i : i + 3]):
            canvas.paste(third, (k * IMAGE_SIZE, 0))
        made.append(canvas)
    return made


METHODS: dict[str, Callable[[Any, list[Canvas], int], list[Image.Image]]] = {
    "regions": regions,
    "tiles": tiles,
    "plain, wide": plain,
    "side by side": side_by_side,
}


def _peak(pipe: Any, name: str, case: Canvas) -> float:
    """Of all that a canvas is drawn from at once."""
    if name == "side by side":
        return drawing_mib(pipe, case.texts, guidance=GUIDANCE)
    editors = {"regions": [_regions([case], 0)], "tiles": [MultiDiffusion(stride=STRIDE)]}
    size = {"height": IMAGE_SIZE, "width": WIDTH}
    return drawing_mib(pipe, case.prompt, *editors.get(name, []), guidance=GUIDANCE, **size)


# -- what became of them ---------------------------------------------------------------------------


def seam_ratio(images: list[Image.Image]) -> float:
    """Gradient across the borders of the thirds over that between all columns; 1: no seam."""
    pixels = np.stack([np.asarray(canvas.convert("RGB"), float) for canvas in images])
    across = np.abs(np.diff(pixels, axis=2)).mean((0, 1, 3))
    return float(across[[IMAGE_SIZE - 1, 2 * IMAGE_SIZE - 1]].mean() / max(across.mean(), 1e-6))


def figures(cases: list[Canvas], images: list[Image.Image]) -> dict[str, float]:
    """in_place: objects found in their own third; found: anywhere on the canvas; too_many: objects
    and blobs beyond those asked for, in a canvas."""
    in_place = found = seen = 0
    for case, canvas in zip(cases, images, strict=True):
        detection = detect(canvas)
        seen += len(detection.objects) + len(detection.extras)
        for k, thing in enumerate(case.things):
            kind = thing.shape, thing.colour
            same = [o for o in detection.objects if (o.shape, o.colour) == kind]
            found += bool(same)
            in_place += any(k <= o.centre[0] / IMAGE_SIZE < k + 1 for o in same)
    return {
        "seam_ratio": round(seam_ratio(images), 2),
        "in_place": round(in_place / (3 * len(cases)), 3),
        "found": round(found / (3 * len(cases)), 3),
        "too_many": round((seen - found) / len(cases), 2),
    }


def image(cases: list[Canvas], drawn: dict[str, list[Image.Image]]) -> Image.Image:
    """For each canvas a row of every method, one below the other."""
    rows, titles = [], []
    for i, case in enumerate(cases[:SHOWN]):
        for name, images in drawn.items():
            rows.append([images[i]])
            titles.append(f"{name}: {case.prompt}" if name == "regions" else name)
    return show.grid(rows, row_titles=titles, cell=(WIDTH, IMAGE_SIZE))
