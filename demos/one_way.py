"""Cyclic and Selective One-Way diffusion on the embedded pipeline: a scene grown round an image.

A quarter of the canvas is a given image of one object; the prompt puts another object below it.
The image must survive (its PSNR, beside that of the autoencoder alone), and the text must be
obeyed round it (beside plain sampling of the prompt, which knows nothing of the image).

Where the image has the gray background of the canvas that it is pasted on, and the prompt says so,
the cycles do all of that. Where it has another background, which the prompt does not name, what
surrounds the image must take the background from it: that is the flow of self-attention that SOW
steers. The same flow turned about, into the image instead of out of it, shows that the direction
counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import hookctl
from hookctl import Claim, Editor
from hookctl.address.regions import Region
from hookctl.attention.call import AttentionCall
from hookctl.demos.cost import FEW, counted, drawing_mib, peak_mib
from hookctl.demos.grown import AT, BOX, SIDE, Case, cases, figures, mean_psnr, restored
from hookctl.demos.shapes.world import IMAGE_SIZE
from hookctl.editor import WHOLE_IMAGE
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import CyclicOneWay, SelectiveOneWay

STEPS, GUIDANCE, BATCH, SHOWN = 20, 3.0, 8, 3
SETTINGS: dict[str, Any] = {"cycles": 5, "finish": 0.05, "final_eta": 0.0}
# Strengths in units of scores: out of the image, and into it.
FLOWS: Mapping[str, dict[str, Any]] = {
    "SOW": {"spread": 2.0, "isolate": -4.0},
    "SOW turned about": {"spread": -4.0, "isolate": 2.0},
}
METHODS: Mapping[str, Sequence[str]] = {
    "background_said": ("plain", "COW"),
    "background_unsaid": ("plain", "COW", *FLOWS),
}

Progress = Callable[[int, int], None]


class Watched(Editor):
    """What share of the attention of all that surrounds the image goes into it."""

    sites = "self @1"

    def __init__(self) -> None:
        self.shares: list[float] = []
        self._region = Region.box(*(side / IMAGE_SIZE for side in BOX))

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, shared=True)]

    def attention(self, call: AttentionCall) -> None:
        assert call.grid is not None  # a UNet's sites have one
        inside = self._region.tokens(call.grid.height, call.grid.width)

        def keep(row: Any, found: Tensor) -> None:
            self.shares.append(float(found.sum(-1)[..., ~inside].mean()))

        call.read(list(call.rows), inside.nonzero().flatten().tolist(), keep)

    def figures(self) -> dict[str, float]:
        return {"attention_into_image": round(float(np.mean(self.shares)), 3)}


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe, started = hookctl.load_shapes(), time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    wanted = [(kind, name) for kind, methods in METHODS.items() for name in methods]
    drawn: dict[tuple[str, str], list[Image.Image]] = {}
    costs: dict[str, dict[str, float]] = {}
    every = {kind: cases(seed, seeds, said=kind == "background_said") for kind in METHODS}
    found: dict[str, dict[str, Any]] = {
        kind: {"autoencoder alone": {"seed_psnr": mean_psnr(some, restored(pipe, some))}}
        for kind, some in every.items()
    }
    for done, (kind, name) in enumerate(wanted, 1):
        watched = Watched()
        with counted(pipe.unet) as cost:
            drawn[kind, name] = draw(pipe, name, every[kind], seed, watched)
        found[kind][name] = figures(every[kind], drawn[kind, name]) | watched.figures()
        costs[name] = {
            "image_rows": round(cost.images / seeds, 2),
            "image_rows_in_theory": theory(name),
            "peak_mib_of_an_image": _peak(pipe, name, every[kind][0]),
        }
        if progress is not None:
            progress(done, len(wanted))
    report = {
        "demo": "one_way",
        "seed": seed,
        "cases_of_each": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        **found,
        "cost": costs,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    save_image(image(every, drawn), out / "grid.png")
    return report


def image(
    every: Mapping[str, Sequence[Case]], drawn: Mapping[tuple[str, str], Sequence[Image.Image]]
) -> Image.Image:
    """The grid: a case a row, with a place for every method."""
    rows: list[list[Image.Image | None]] = []
    titles = []
    for kind, some in every.items():
        for i, case in enumerate(some[:SHOWN]):
            made = [drawn.get((kind, name)) for name in ("plain", "COW", *FLOWS)]
            rows.append([case.image, *(None if one is None else one[i] for one in made)])
            titles.append(case.prompt)
    columns = ["given image", "plain, without it", "COW", *FLOWS]
    return show.grid(rows, column_titles=columns, row_titles=titles, cell=(140, 140))


def draw(
    pipe: Any, name: str, every: Sequence[Case], seed: int, watched: Watched
) -> list[Image.Image]:
    """Every case by one method, in batches."""
    made: list[Image.Image] = []
    for i in range(0, len(every), BATCH):
        part = every[i : i + BATCH]
        prompts, pasted = [case.prompt for case in part], [case.image for case in part]
        if name == "plain":
            generator = torch.Generator().manual_seed(seed + i)
            plain = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
            with hookctl.control(pipe, watched):
                made += pipe(prompts, generator=generator, **plain).images
        else:
            given = SETTINGS | {"steps": STEPS, "guidance": GUIDANCE, "seed": seed + i}
            given |= {"at": AT, **FLOWS.get(name, {})}
            made += _method(name)(pipe, pasted, prompts, **given).run(watched)
    return made


def _peak(pipe: Any, name: str, case: Case) -> float:
    """Of a few steps; a cycle takes no more than the one before it."""
    if name == "plain":
        return drawing_mib(pipe, case.prompt, guidance=GUIDANCE)
    given = {"at": AT, "guidance": GUIDANCE, **FLOWS.get(name, {})}
    given |= SETTINGS | {"steps": FEW, "cycles": 1}
    program = _method(name)(pipe, case.image, case.prompt, **given)
    return peak_mib(lambda: program.run(output_type="latent"))


def _method(name: str) -> type[CyclicOneWay]:
    return SelectiveOneWay if name in FLOWS else CyclicOneWay


def theory(name: str) -> float:
    """Denoiser rows for an image: of inversions (one each), cycles and the end (two each)."""
    if name == "plain":
        return 2.0 * STEPS
    low, high = int(0.5 * STEPS), int(0.7 * STEPS)
    inversions = high * (SIDE / IMAGE_SIZE) ** 2 + low
    return inversions + 2.0 * SETTINGS["cycles"] * (high - low) + 2.0 * low
