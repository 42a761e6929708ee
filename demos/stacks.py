"""Stacks: methods together in one run, each stack measured for what its parts are there for.

Prompt-to-Prompt with FreeU, and on an inverted image with a local blend; regional prompts with
masked self-attention and the multi-instance sampler; RealCompo with FreeU; Attend-and-Excite with
PAG; MasaCtrl with a LoRA. The plain images have the same prompts and noise; every figure stands
under the member of the stack that answers for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import hookctl
from hookctl.demos import placing
from hookctl.demos.cost import drawing_mib
from hookctl.demos.layouts import LayoutCase, draw_layout
from hookctl.demos.real_compo import METHODS as COMPOSED
from hookctl.demos.regional import figures as in_parts
from hookctl.demos.regional import layout as parts_of
from hookctl.demos.regional import sampled_and_masked
from hookctl.demos.regional import theory as regional_theory
from hookctl.demos.stacked_edits import (
    GUIDANCE,
    STEPS,
    Figures,
    Stacked,
    on_inverted,
    with_freeu,
    with_lora,
)
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import PAG, AttendAndExcite, FreeU

SHOWN = 2
# Gentle, for energies that look through it: the embedded UNet is far narrower than those that
# FreeU's gains were found on.
GENTLE: dict[str, Any] = {"b1": 1.05, "b2": 1.05, "s1": 0.95, "s2": 0.9}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Placing:
    """A stack that draws objects of which the places are known.

    members: the figures that each answers for; theory: whole denoiser rows for an image; places:
    an image of those that a case has.
    """

    objects: int
    stack: placing.Stack
    members: Mapping[str, tuple[str, ...]]
    theory: Callable[[Sequence[LayoutCase]], float]
    places: Callable[[LayoutCase], Image.Image] = placing.layout

    def __call__(self, pipe: Any, seed: int, count: int) -> Stacked:
        rng = np.random.default_rng([seed, 13])
        cases = [draw_layout(rng, self.objects) for _ in range(count)]
        plain = placing.draw(pipe, cases, lambda _: [], seed)
        stacked = placing.draw(pipe, cases, self.stack, seed)
        first = cases[0].prompt
        return Stacked(
            [
                [self.places(case), a, b]
                for case, a, b in zip(cases, plain.images, stacked.images, strict=True)
            ],
            {
                "stack": self.read(cases, stacked),
                "plain": self.read(cases, plain),
            },
            count,
            stacked.rows,
            self.theory(cases) + stacked.partial,
            (
                drawing_mib(pipe, first, *self.stack(cases[:1]), guidance=GUIDANCE),
                drawing_mib(pipe, first, guidance=GUIDANCE),
            ),
        )

    def read(self, cases: Sequence[LayoutCase], drawn: placing.Drawn) -> Figures:
        parts = in_parts(cases, drawn.images)
        found = {
            **placing.attended(drawn),
            **placing.placed(cases, drawn.images),
            **placing.named(cases, drawn.images),
            "right": parts["right"],
            "leaked": parts["leaked"],
        }
        return {who: {name: found[name] for name in names} for who, names in self.members.items()}


REGIONS = Placing(
    2,
    sampled_and_masked,
    {
        "regional prompts": ("right",),
        "masked self-attention": ("leaked",),
        "multi-instance sampler": ("missing", "attributes"),
    },
    lambda cases: regional_theory("sampler", cases),
    parts_of,
)
# FreeU acts in the energies of the layout model too.
REAL_COMPO = Placing(
    2,
    lambda cases: [*COMPOSED["RealCompo"](cases), FreeU(**GENTLE)],
    {"RealCompo": ("hits", "box_iou", "attributes"), "FreeU": ("whole", "surplus")},
    lambda _: placing.theory("RealCompo"),
)
# The perturbed rows of PAG are edited as their prompts' are.
EXCITED = Placing(
    3,
    lambda cases: [AttendAndExcite(placing.words(cases), refinements=5), PAG(1.0)],
    {"Attend-and-Excite": ("weakest_noun", "missing", "whole"), "PAG": ("attributes", "surplus")},
    lambda _: 3.0 * STEPS,
)

STACKS: dict[str, Callable[[Any, int, int], Stacked]] = {
    "Prompt-to-Prompt + FreeU": with_freeu,
    "Prompt-to-Prompt on an inverted image + local blend": on_inverted,
    "regional prompts + masked self-attention + multi-instance sampler": REGIONS,
    "RealCompo + FreeU": REAL_COMPO,
    "Attend-and-Excite + PAG": EXCITED,
    "MasaCtrl + LoRA": with_lora,
}


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    found: dict[str, Stacked] = {}
    for done, (name, stack) in enumerate(STACKS.items(), 1):
        found[name] = stack(pipe, seed, seeds)
        if progress is not None:
            progress(done, len(STACKS))
    report = {
        "demo": "stacks",
        "seed": seed,
        "cases_per_stack": seeds,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        **{name: one.figures for name, one in found.items()},
        "cost": {name: one.cost for name, one in found.items()},
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    shown = [(name, row) for name, one in found.items() for row in one.rows[:SHOWN]]
    sheet = show.grid(
        [row for _, row in shown],
        column_titles=["source or places", "plain", "stack"],
        row_titles=[name for name, _ in shown],
        cell=(128, 128),
    )
    save_image(sheet, out / "grid.png")
    return report
