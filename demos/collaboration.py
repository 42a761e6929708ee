"""Two models that each know half: colours from a text, places from a mask. Collaborative Diffusion.

A model that reads masks and knows no colours draws together with the embedded one, which is told
shapes and colours and not where they are. Two dynamic diffusers, trained while both models were
frozen, say how far each is trusted where and when. All three are loaded from one file of the
official layout.

Columns: the mask, each model alone, the plain mean of both, and the collaboration. In
grid_influence.png the mask's share over the steps: 1 where the mask's model is trusted alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import hookctl
from hookctl.demos.cost import counted, drawing_mib
from hookctl.demos.layouts import draw_layout
from hookctl.demos.placing import GUIDANCE, STEPS
from hookctl.demos.shapes.hooks.collaboration import caption_of
from hookctl.demos.shapes.hooks.measure_collaboration import (
    Drawn,
    collaboration,
    draw,
    figures,
    together,
    ways,
)
from hookctl.demos.shapes.load import WEIGHTS
from hookctl.demos.shapes.world import Scene
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json

FILE = WEIGHTS / "hooks" / "collaboration.safetensors"
TITLES = {
    "text": "text alone",
    "mask": "mask alone",
    "mean": "mean of both",
    "collaboration": "collaboration",
}
SHOWN, OVER_TIME = 6, 3  # cases in the grids
AT = (0, 2, 4, 6, 8, 12, 16, 24)  # steps whose influence is shown
PAPER, INK = 235, 70  # grey levels of a mask that is shown

Progress = Callable[[int, int], None]


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png, grid_influence.png and report.json and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe, started = hookctl.load_shapes(), time.perf_counter()
    rng = np.random.default_rng([seed, 13])
    cases = [draw_layout(rng, 2) for _ in range(seeds)]
    scenes = [Scene(case.things, case.background) for case in cases]
    drawn: dict[str, Drawn] = {}
    rows: dict[str, float] = {}
    every = ways(collaboration(FILE, pipe, scenes))
    for done, (name, models) in enumerate(every.items(), 1):
        with counted(pipe.unet) as cost:
            drawn[name] = draw(pipe, models, scenes, STEPS, GUIDANCE, seed)
        rows[name] = cost.rows / seeds
        if progress is not None:
            progress(done, len(every))
    both = together(ways(collaboration(FILE, pipe, scenes[:1]))["collaboration"])
    report = {
        "demo": "collaboration",
        "seed": seed,
        "cases": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": {TITLES[name]: figures(one, scenes) for name, one in drawn.items()},
        "cost": {
            "rows_per_image_of_the_text_model": {TITLES[k]: round(v, 1) for k, v in rows.items()},
            "peak_mib_of_an_image": {
                "text alone": drawing_mib(pipe, caption_of(scenes[0]), guidance=GUIDANCE),
                "collaboration": drawing_mib(pipe, caption_of(scenes[0]), both, guidance=GUIDANCE),
            },
        },
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    save_image(pictures(scenes, drawn), out / "grid.png")
    save_image(over_time(scenes, drawn["collaboration"]), out / "grid_influence.png")
    return report


def pictures(scenes: Sequence[Scene], drawn: Mapping[str, Drawn]) -> Image.Image:
    """A case a row: its mask, and what each way drew of it."""
    rows = [
        [mask_image(scene), *(Image.fromarray(one.images[i]) for one in drawn.values())]
        for i, scene in enumerate(scenes[:SHOWN])
    ]
    titles = [caption_of(scene) for scene in scenes[:SHOWN]]
    return show.grid(rows, ["mask", *(TITLES[name] for name in drawn)], titles, (140, 140))


def over_time(scenes: Sequence[Scene], drawn: Drawn) -> Image.Image:
    """A case a row: the image, and the mask's share of some steps over it."""
    assert drawn.influence is not None
    steps = [step for step in AT if step < len(drawn.influence)]
    rows = []
    for i in range(min(OVER_TIME, len(scenes))):
        image = Image.fromarray(drawn.images[i])
        shares = [drawn.influence[step, i] for step in steps]
        rows.append([image, *(show.heatmap(one, (128, 128), scale=(0.0, 1.0)) for one in shares)])
    titles = ["image", *(f"step {step + 1}" for step in steps)]
    beside = [f"mask's share: {caption_of(scene)}" for scene in scenes[: len(rows)]]
    scales = [(0.0, 1.0)] * len(rows)
    return show.grid(rows, titles, beside, (128, 128), scales=scales, widest=None)


def mask_image(scene: Scene) -> Image.Image:
    """The silhouettes of a scene."""
    covered = np.logical_or.reduce([thing.mask() for thing in scene.things])
    return Image.fromarray(np.where(covered, INK, PAPER).astype(np.uint8)).convert("RGB")
