"""FreeU, ScaleU, PAG, SAG and SEG against plain sampling: same prompts, noise, number of steps.

The detector counts the images in which every object is as its prompt says and nothing else is
there. All settings are the published ones; ScaleU, whose gains are learned, is given some by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl import Editor
from hookctl.demos.cost import counted, drawing_mib
from hookctl.demos.shapes.captions import sample
from hookctl.demos.shapes.detect import detect, matches, wanted_pairs
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import PAG, SAG, SEG, FreeU, ScaleU

STEPS, GUIDANCE, BATCH = 25, 3.0, 16
SHOWN = 6  # cases in the grid

# The middle block, where PAG and SEG act in Stable Diffusion, says next to nothing in this model:
# its skip connections pass it by. So they act on all grids but the finest.
COARSE = "self @<=1/2"

METHODS: dict[str, Callable[[], Editor | None]] = {
    "plain": lambda: None,
    "FreeU": FreeU,
    # Of the first half of the decoder, in the direction of FreeU's.
    "ScaleU": lambda: ScaleU(backbone=[0.2] * 3, skip=[-0.2] * 3),
    "PAG": lambda: PAG(sites=COARSE),
    "SAG": SAG,
    "SEG": lambda: SEG(sites=COARSE),
}
# Rows that an image needs; plain guidance takes two in a step. The noise that this model starts
# from holds no image for SAG to blur.
ROWS = {
    "plain": 2 * STEPS,
    "FreeU": 2 * STEPS,
    "ScaleU": 2 * STEPS,
    "PAG": 3 * STEPS,
    "SAG": 3 * STEPS - 1,
    "SEG": 3 * STEPS,
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Drawn:
    """The images of one method, rows that each cost, and the seconds for all."""

    images: list[Image.Image]
    rows: float
    seconds: float


def prompts_of(seed: int, count: int) -> list[str]:
    """Held-out prompts, a third each of one, two and three objects."""
    rng = np.random.default_rng([seed, 1])
    return [sample(rng, 1 + i % 3, held_out=True)[1] for i in range(count)]


def draw(pipe: Any, prompts: Sequence[str], seed: int, editor: Editor | None) -> Drawn:
    """One image for each prompt, prompt i from seed + i."""
    images, started = [], time.perf_counter()
    with counted(pipe.unet) as cost, hookctl.control(pipe, *([editor] if editor else [])):
        for i in range(0, len(prompts), BATCH):
            part = list(prompts[i : i + BATCH])
            seeds = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
            images += pipe(
                part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds
            ).images
    return Drawn(images, cost.rows / len(prompts), time.perf_counter() - started)


def _peak(pipe: Any, prompt: str, editor: Editor | None) -> float:
    return drawing_mib(pipe, prompt, *([editor] if editor else []), guidance=GUIDANCE)


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    started, prompts = time.perf_counter(), prompts_of(seed, seeds)
    drawn = {}
    for i, (name, make) in enumerate(METHODS.items(), 1):
        drawn[name] = draw(pipe, prompts, seed, make())
        if progress is not None:
            progress(i, len(METHODS))
    report = {
        "demo": "guidance",
        "seed": seed,
        "cases": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": {name: figures(prompts, one.images) for name, one in drawn.items()},
        "cost": {
            name: {
                "rows_per_image": one.rows,
                "rows_in_theory": ROWS[name],
                "peak_mib_of_an_image": _peak(pipe, prompts[0], METHODS[name]()),
                "seconds_per_image": round(one.seconds / seeds, 2),
            }
            for name, one in drawn.items()
        },
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    save_image(image(prompts, {name: one.images for name, one in drawn.items()}), out / "grid.png")
    return report


def figures(prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, float]:
    """strict: images with all objects right and nothing else; found: objects that are there;
    too_many: objects and blobs beyond those asked for, in an image."""
    right = found = asked = extra = 0
    for prompt, one in zip(prompts, images, strict=True):
        detection, wanted = detect(one), wanted_pairs(prompt)
        there = sum((detection.pairs & wanted).values())
        right += matches(detection, prompt)
        found, asked = found + there, asked + sum(wanted.values())
        extra += len(detection.objects) - there + len(detection.extras)
    n = len(prompts)
    return {
        "strict": round(right / n, 3),
        "found": round(found / asked, 3),
        "too_many": round(extra / n, 3),
    }


def image(prompts: Sequence[str], images: dict[str, list[Image.Image]]) -> Image.Image:
    """A case a row, a method a column."""
    shown = min(SHOWN, len(prompts))
    rows = [[column[i] for column in images.values()] for i in range(shown)]
    return show.grid(
        rows, column_titles=list(images), row_titles=list(prompts[:shown]), cell=(160, 160)
    )
