"""Imagic: a rendered picture recoloured, at several shares of the wanted text.

One alpha trades the picture for the text: figures.png shows how often the edit is there and how
often the other object stayed, against alpha. Fitting is dear, so there is a quarter of the cases.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import hookctl
from hookctl import show
from hookctl.demos.cases import draw
from hookctl.demos.cost import counted
from hookctl.demos.figures import measure, summary
from hookctl.demos.inversion import pictures_of
from hookctl.recipes import Imagic

STEPS, GUIDANCE, EVERY = 25, 3.0, 4
ALPHAS = (0.0, 0.4, 0.7, 1.0, 1.3)
FIT: dict[str, Any] = {
    "text_steps": 60,
    "text_rate": 1e-2,
    "model_steps": 60,
    "model_rate": 2e-3,
    "rank": 8,
    "schedule_steps": STEPS,
}
SHOWN = 4  # cases in the grid
_LINES = {"edit_success": "#d62728", "kept": "#1f77b4"}

Progress = Callable[[int, int], None]


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png, figures.png and report.json and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe, begun = hookctl.load_shapes(), time.perf_counter()
    rng = np.random.default_rng([seed, 11])
    count = -(-seeds // EVERY)
    cases = [draw("colour", rng) for _ in range(count)]
    pictures = pictures_of(cases, rng)
    drawn: list[list[Image.Image]] = []
    with counted(pipe.unet) as rows:
        for i, (case, one) in enumerate(zip(cases, pictures, strict=True)):
            fitted = Imagic(pipe, one, case.target, seed=seed + i, **FIT).fit()
            given = {"guidance": GUIDANCE, "steps": STEPS, "seed": seed + i}
            plain = fitted.draw((1.0,), changed=False, **given)
            drawn.append([*plain, *fitted.draw(ALPHAS, **given)])
            if progress is not None:
                progress(i + 1, count)
    columns = ["plain text", *(f"alpha {alpha:g}" for alpha in ALPHAS)]
    figures = {
        name: summary(
            [measure(c, p, row[k]) for c, p, row in zip(cases, pictures, drawn, strict=True)]
        )
        for k, name in enumerate(columns)
    }
    draws = (1 + len(ALPHAS)) * 2 * STEPS
    report = {
        "demo": "imagic",
        "seed": seed,
        "cases": count,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": figures,
        "cost": {
            "rows_per_picture": rows.rows / count,
            "rows_in_theory": FIT["text_steps"] + FIT["model_steps"] + draws,
        },
        "wall_seconds": round(time.perf_counter() - begun, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show.grid(
        [[p, *row] for p, row in zip(pictures[:SHOWN], drawn, strict=False)],
        column_titles=["picture", *columns],
        row_titles=[case.title for case in cases[:SHOWN]],
        cell=(128, 128),
    ).save(out / "grid.png")
    plot(ALPHAS, [figures[name] for name in columns[1:]]).save(out / "figures.png")
    return report


def plot(alphas: Sequence[float], figures: Sequence[dict[str, float]]) -> Image.Image:
    """Shares between 0 and 1 against alpha, a line for each."""
    width, height, pad = 480, 300, 48
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)

    def place(alpha: float, share: float) -> tuple[float, float]:
        along = (alpha - alphas[0]) / (alphas[-1] - alphas[0])
        return pad + along * (width - 2 * pad), height - pad - share * (height - 2 * pad)

    pen.line([place(alphas[0], 1), place(alphas[0], 0), place(alphas[-1], 0)], "black")
    for alpha in alphas:
        pen.text(place(alpha, -0.06), f"{alpha:g}", "black", anchor="mt")
    for share in (0.0, 0.5, 1.0):
        x, y = place(alphas[0], share)
        pen.text((x - 6, y), f"{share:g}", "black", anchor="rm")
    for k, (name, colour) in enumerate(_LINES.items()):
        points = [place(a, f[name]) for a, f in zip(alphas, figures, strict=True)]
        pen.line(points, colour, 2)
        for x, y in points:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        pen.text((pad + 10 + 110 * k, 14), name.replace("_", " "), colour)
    pen.text((width / 2, height - 16), "alpha", "black", anchor="mm")
    return canvas
