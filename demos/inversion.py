"""Real images: how well each inversion gives one back, and what an edit on top does.

The images are rendered from the world, not drawn by the model. Each is inverted by every method,
drawn again, and its colour swapped by Prompt-to-Prompt. An autoencoder loses something in any case,
so reconstructions are judged beside its round trip.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hookctl import Editor
from hookctl.address.families import denoiser_of
from hookctl.demos.cases import EditCase, draw
from hookctl.demos.cost import FEW, counted, peak_mib
from hookctl.demos.figures import EditFigures, measure, summary
from hookctl.demos.models import SHAPES_FLOW, call_of, opened
from hookctl.demos.shapes.captions import parse
from hookctl.demos.shapes.render import drawn
from hookctl.demos.shapes.world import Scene, Thing
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.loop.images import decode, encode
from hookctl.loop.inversion import Correction
from hookctl.loop.noise import noise_like
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import (
    DDIMInversion,
    DirectInversion,
    EditFriendlyDDPM,
    NegativePromptInversion,
    NullTextInversion,
    PromptToPrompt,
    ProximalGuidance,
)
from hookctl.recipes.common.real_images.inverted import Inverted

STEPS, GUIDANCE, BATCH = 25, 3.0, 8
SHOWN = 4  # cases in the grid
SKIP = 0.12


@dataclass(frozen=True)
class Method:
    """An inversion, and how images of it are edited.

    rows: of the inversion alone; drawing an image and one edit takes four in a step. options: of
    the inversion; swap: of Prompt-to-Prompt; guidance: scale of the edits, and of the image drawn
    again unless the inversion has one of its own; beside: a further editor.
    """

    recipe: Callable[..., Any]
    rows: int
    options: Mapping[str, Any] = field(default_factory=lambda: {"guidance": GUIDANCE})
    # What is published for real images: self-attention replaced in 0.4 to 0.6 of the steps.
    swap: Mapping[str, Any] = field(
        default_factory=lambda: {"cross_replace": 0.8, "self_replace": 0.6}
    )
    guidance: float = GUIDANCE
    beside: Callable[[], Editor] | None = None

    def invert(self, pipe: Any, image: Any, prompt: Any, steps: int = STEPS) -> Any:
        """The inversion, to be run."""
        given = {"steps": steps, "arguments": call_of(pipe), **self.options}
        return self.recipe(pipe, image, prompt, **given)


METHODS: dict[str, Method] = {
    # Drawn again with the guidance of the edits, as in the published comparisons.
    "DDIM": Method(DDIMInversion, STEPS, {}),
    "negative prompt": Method(NegativePromptInversion, STEPS),
    "ProxEdit": Method(NegativePromptInversion, STEPS, beside=ProximalGuidance),
    # Inverted, these flat images have noise of up to twice the spread that the model knows.
    "direct": Method(DirectInversion, STEPS, {"guidance": GUIDANCE, "unit_noise": True}),
    # Its noise holds the image faster: edits are guided harder and let go earlier, as published.
    "DDPM": Method(
        EditFriendlyDDPM,
        2 * (STEPS - int(SKIP * STEPS)),
        {"guidance": GUIDANCE, "skip": SKIP},
        {"cross_replace": 0.6, "self_replace": 0.6},
        guidance=7.5,
    ),
    # This model's latents are cleaner than a photograph's, so that less is good enough; its text
    # embeddings are longer than CLIP's, and at the published 1e-2 the steps end before the fit.
    "null-text": Method(
        NullTextInversion,
        3 * STEPS + (1 + 10 + 2) * STEPS,
        {"guidance": GUIDANCE, "tolerance": 0.0, "refine": 2, "rate": 4e-2},
    ),
}


class Noised(DirectInversion):
    """Without an inversion: the image with one noise mixed in, at the level of every step."""

    def _invert(self, program: Trajectory, progress: Any) -> Inverted:
        noise = noise_like(self.clean, torch.Generator().manual_seed(0))
        path = [*(level.mix(self.clean, noise) for level in program.levels[:-1]), self.clean]
        led = [Correction(target=x) for x in path[1:]]
        return self._inverted(program, path, led, edit_guidance=self.guidance)


# Of those that a scheduler without noise in its steps allows; null-texts would take an hour.
ON_FLOW: dict[str, Method] = {
    **{name: METHODS[name] for name in ("DDIM", "negative prompt", "ProxEdit", "direct")},
    "noised": Method(Noised, 0),
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One image by one method: drawn again, and edited."""

    again: Image.Image
    edited: Image.Image
    psnr: float
    figures: EditFigures


def scene_of(case: EditCase, rng: np.random.Generator) -> Scene:
    """The two objects of a case as its source prompt places them."""
    request = parse(case.source)
    relation = next(r for r in ("above", "below", "left", "right") if r in case.source)
    near, far, across = (int(2 * rng.integers(a, b)) for a, b in ((17, 20), (45, 48), (29, 36)))
    first, second = (near, far) if relation in ("above", "left") else (far, near)
    upright = relation in ("above", "below")
    things = tuple(
        Thing(*thing, centre=(across, along) if upright else (along, across))
        for thing, along in ((case.before, first), (case.other, second))
    )
    return Scene(things, request.background or "white")


def images_of(cases: list[EditCase], rng: np.random.Generator) -> list[Image.Image]:
    return drawn([scene_of(case, rng) for case in cases])


def psnr(a: Image.Image, b: Image.Image) -> float:
    """In dB, peak 255, at most 100."""
    error = float(((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean())
    return min(100.0, 10 * float(np.log10(255.0**2 / max(error, 1e-10))))


def invert(pipe: Any, method: Method, images: list[Image.Image], prompts: list[str]) -> list[Any]:
    found = []
    for i in range(0, len(images), BATCH):
        part = slice(i, i + BATCH)
        found += method.invert(pipe, images[part], prompts[part]).run()
    return found


def edit(pipe: Any, method: Method, inverted: Any, case: EditCase, image: Image.Image) -> Outcome:
    swap = PromptToPrompt(
        [case.source, case.target], self_resolution=1.0, blend=case.words, **method.swap
    )
    again, edited = inverted.edit(
        pipe,
        swap,
        *([] if method.beside is None else [method.beside()]),
        guidance=method.guidance,
        source_guidance=method.options.get("guidance", method.guidance),
    )
    return Outcome(again, edited, psnr(image, again), measure(case, image, edited))


def _peak(pipe: Any, method: Method, case: EditCase, image: Image.Image) -> float:
    """Of one image's inversion over a few steps."""
    return peak_mib(method.invert(pipe, image, case.source, steps=FEW).run)


def run(
    out: Path,
    seed: int = 0,
    seeds: int = 4,
    progress: Progress | None = None,
    model: str = "shapes",
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe, run_started = opened(model), time.perf_counter()
    methods = ON_FLOW if model == SHAPES_FLOW else METHODS
    rng = np.random.default_rng([seed, 7])
    cases = [draw("colour", rng) for _ in range(seeds)]
    images = images_of(cases, rng)
    round_trip = [decode(pipe, encode(pipe, one))[0] for one in images]
    outcomes: dict[str, list[Outcome]] = {}
    cost: dict[str, Any] = {}
    for done, (name, method) in enumerate(methods.items(), 1):
        started = time.perf_counter()
        with counted(denoiser_of(pipe)) as rows:
            found = invert(pipe, method, images, [case.source for case in cases])
        seconds = time.perf_counter() - started
        cost[name] = {
            "rows_per_inversion": rows.rows / seeds,
            "rows_in_theory": method.rows,
            "peak_mib_of_an_image": _peak(pipe, method, cases[0], images[0]),
            "seconds_per_inversion": round(seconds / seeds, 2),
        }
        outcomes[name] = [
            edit(pipe, method, *one) for one in zip(found, cases, images, strict=True)
        ]
        if progress is not None:
            progress(done, len(methods))
    lost = [psnr(a, b) for a, b in zip(images, round_trip, strict=True)]
    report = {
        "demo": "inversion",
        "model": model,
        "seed": seed,
        "cases": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "autoencoder_psnr": round(float(np.mean(lost)), 2),
        "methods": {name: _report(found, lost) for name, found in outcomes.items()},
        "cost": cost,
        "wall_seconds": round(time.perf_counter() - run_started, 1),
    }
    write_json(out / "report.json", report)
    save_image(image(cases, images, outcomes), out / "grid.png")
    return report


def _report(found: list[Outcome], lost: list[float]) -> dict[str, Any]:
    """psnr: of the image drawn again, against the image; behind_autoencoder: dB that the round
    trip of the same images is ahead."""
    mean = float(np.mean([o.psnr for o in found]))
    return {
        "psnr": round(mean, 2),
        "behind_autoencoder": round(float(np.mean(lost)) - mean, 2),
        **summary([o.figures for o in found]),
    }


def image(
    cases: list[EditCase],
    images: list[Image.Image],
    outcomes: dict[str, list[Outcome]],
) -> Image.Image:
    """A case a row: the image, then for each method the image again and its edit."""
    shown = range(min(SHOWN, len(cases)))
    rows: list[list[Image.Image | None]] = []
    for i in shown:
        row: list[Image.Image | None] = [images[i]]
        for found in outcomes.values():
            row += [found[i].again, found[i].edited]
        rows.append(row)
    titles = ["image", *(t for name in outcomes for t in (f"{name}: again", f"{name}: edited"))]
    return show.grid(
        rows, column_titles=titles, row_titles=[cases[i].title for i in shown], cell=(128, 128)
    )
