"""A look that no word names, read off a reference picture and drawn anew: InstantID.

Resampler, second cross-attention and IdentityNet as they were trained on the frozen embedded
denoiser, loaded from their files as the official ones are. Hues are any on the circle, bars of any
depth; the prompt says shape, size and background, and of the colour nothing, or a wrong one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hookctl
from hookctl.demos.shapes.hooks.identity_encoder import WEIGHTS
from hookctl.demos.shapes.hooks.measure_identity import Cases, draw, figures_of, ways_of
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json

ADAPTER, NET = WEIGHTS / "identity.safetensors", WEIGHTS / "identity_net"
STEPS, GUIDANCE, SHOWN = 25, 3.0, 6

Progress = Callable[[int, int], None]


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe, started = hookctl.load_shapes(), time.perf_counter()
    cases = Cases(seeds, seed=5 * 10**8 + seed)
    ways = ways_of(cases, NET)
    drawn = {}
    for done, (name, way) in enumerate(ways.items(), 1):
        net = NET if "place" in name else None
        drawn[name] = draw(pipe, ADAPTER, way, net, steps=STEPS, guidance=GUIDANCE, seed=seed)
        if progress is not None:
            progress(done, len(ways))
    report = {
        "demo": "identity",
        "seed": seed,
        "cases": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": {name: figures_of(images, cases) for name, images in drawn.items()},
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    titles = [
        f"{text} (any colour: {colour})"
        for text, colour in zip(cases.prompts(), cases.colours, strict=True)
    ]
    sheet = show.grid(
        [
            [reference, *row]
            for reference, *row in zip(cases.references, *drawn.values(), strict=True)
        ][:SHOWN],
        column_titles=["reference", *drawn],
        row_titles=titles[:SHOWN],
        cell=(140, 140),
    )
    save_image(sheet, out / "grid.png")
    return report
