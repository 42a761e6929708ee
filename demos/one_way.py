"""Cyclic and Selective One-Way diffusion on the embedded pipeline: a scene grown round a picture.

A quarter of the canvas is a given picture of one object; the prompt puts another object below it.
The picture must survive (its PSNR, beside that of the autoencoder alone), and the text must be
obeyed round it (beside plain sampling of the prompt, which knows nothing of the picture).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl import show
from hookctl.demos.cost import counted
from hookctl.demos.shapes.captions import describe
from hookctl.demos.shapes.detect import Detection, detect
from hookctl.demos.shapes.render import render
from hookctl.demos.shapes.world import COLOUR_NAMES, PATTERNS, PICTURE, SHAPES, Scene, Thing
from hookctl.loop.pictures import decode, encode
from hookctl.recipes import CyclicOneWay, SelectiveOneWay

STEPS, GUIDANCE, BATCH, SHOWN = 20, 3.0, 8, 4
GROUND = "gray"  # the seed canvas's own, so that no edge is pasted
SIDE = PICTURE // 2
AT = ((PICTURE - SIDE) // 2, 0)
BOX = (*AT, AT[0] + SIDE, AT[1] + SIDE)
SETTINGS: dict[str, Any] = {"cycles": 5, "finish": 0.05, "final_eta": 0.0}
METHODS: dict[str, type[CyclicOneWay]] = {"COW": CyclicOneWay, "SOW": SelectiveOneWay}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Case:
    """The object of the given picture, and the one that the text wants below it."""

    given: Thing
    wanted: Thing

    @property
    def prompt(self) -> str:
        said = f"{describe(self.given)} above {describe(self.wanted)}"
        return f"{said} on a {GROUND} background"

    @property
    def picture(self) -> Image.Image:
        pixels = (render([Scene((self.given,), GROUND)])[0] + 1) * 127.5
        whole = Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
        left = (PICTURE - SIDE) // 2
        return whole.crop((left, left, left + SIDE, left + SIDE))


def cases(seed: int, count: int) -> list[Case]:
    rng = np.random.default_rng([seed, 5])
    made = []
    for _ in range(count):
        shapes, colours = rng.permutation(SHAPES)[:2], rng.permutation(COLOUR_NAMES)[:2]
        things = [
            Thing(str(s), str(c), str(rng.choice(PATTERNS)))
            for s, c in zip(shapes, colours, strict=True)
        ]
        made.append(Case(*things))
    return made


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    every, begun = cases(seed, seeds), time.perf_counter()
    drawn: dict[str, list[Image.Image]] = {}
    costs: dict[str, Any] = {}
    for done, name in enumerate(("plain", *METHODS), 1):
        with counted(pipe.unet) as cost:
            drawn[name] = draw(pipe, name, every, seed)
        costs[name] = {
            "picture_rows": round(cost.pictures / seeds, 2),
            "picture_rows_in_theory": theory(name),
        }
        if progress is not None:
            progress(done, 1 + len(METHODS))
    bound = [round_trip(pipe, case.picture) for case in every]
    report = {
        "demo": "one_way",
        "seed": seed,
        "cases": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": {
            "autoencoder alone": {"seed_psnr": mean_psnr(every, bound)},
            **{name: figures(every, pictures) for name, pictures in drawn.items()},
        },
        "cost": costs,
        "wall_seconds": round(time.perf_counter() - begun, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = [
        [case.picture, *(drawn[name][i] for name in drawn)] for i, case in enumerate(every[:SHOWN])
    ]
    columns = ["given picture", "plain, without it", "COW", "SOW"]
    titles = [case.prompt for case in every[:SHOWN]]
    show.grid(rows, column_titles=columns, row_titles=titles, cell=(160, 160)).save(
        out / "grid.png"
    )
    return report


def draw(pipe: Any, name: str, every: list[Case], seed: int) -> list[Image.Image]:
    """Every case by one method, in batches."""
    made: list[Image.Image] = []
    for i in range(0, len(every), BATCH):
        part = every[i : i + BATCH]
        prompts = [case.prompt for case in part]
        if name == "plain":
            generator = torch.Generator().manual_seed(seed + i)
            made += pipe(
                prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator
            ).images
            continue
        pictures = [case.picture for case in part]
        common = {"at": AT, "steps": STEPS, "guidance": GUIDANCE, "seed": seed + i, **SETTINGS}
        made += METHODS[name](pipe, pictures, prompts, **common).run()
    return made


def theory(name: str) -> float:
    """Denoiser rows for a picture: of inversions (one each), cycles and the end (two each)."""
    if name == "plain":
        return 2.0 * STEPS
    low, high = int(0.5 * STEPS), int(0.7 * STEPS)
    inversions = high * (SIDE / PICTURE) ** 2 + low
    return inversions + 2.0 * SETTINGS["cycles"] * (high - low) + 2.0 * low


def round_trip(pipe: Any, picture: Image.Image) -> Image.Image:
    """A gray canvas with the picture on it, through the autoencoder and back."""
    canvas = Image.new("RGB", (PICTURE, PICTURE), (128, 128, 128))
    canvas.paste(picture, AT)
    restored: Image.Image = decode(pipe, encode(pipe, canvas))[0]
    return restored


# -- what became of them ---------------------------------------------------------------------------


def seed_psnr(case: Case, picture: Image.Image) -> float:
    """dB, of the given picture's place on the canvas, peak 255."""
    a, b = (np.asarray(x, float) for x in (picture.crop(BOX), case.picture))
    return float(10 * np.log10(255.0**2 / max(((a - b) ** 2).mean(), 1e-10)))


def mean_psnr(every: list[Case], pictures: list[Image.Image]) -> float:
    found = [seed_psnr(case, picture) for case, picture in zip(every, pictures, strict=True)]
    return round(float(np.mean(found)), 2)


def obeyed(case: Case, detection: Detection) -> bool:
    """Whether the wanted object is there, outside the given picture."""
    found = detection.find(case.wanted.shape, case.wanted.colour)
    if found is None or found.pattern != case.wanted.pattern:
        return False
    x, y = found.centre
    return not (BOX[0] <= x < BOX[2] and BOX[1] <= y < BOX[3])


def figures(every: list[Case], pictures: list[Image.Image]) -> dict[str, float]:
    detections = [detect(picture) for picture in pictures]
    text = [obeyed(case, seen) for case, seen in zip(every, detections, strict=True)]
    given = [
        seen.find(case.given.shape, case.given.colour) is not None
        for case, seen in zip(every, detections, strict=True)
    ]
    return {
        "seed_psnr": mean_psnr(every, pictures),
        "given_object": round(float(np.mean(given)), 3),
        "text_obeyed_outside": round(float(np.mean(text)), 3),
    }
