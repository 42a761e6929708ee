"""Two objects where their boxes are: layout guidance and BoxDiff against plain sampling.

Boxes are those of held-out scenes whose prompts do not say where things are exactly. share in box:
of the noun's attention, in the second half of the run and while the methods guide; hits: objects
found in their box. No method need reach a share of 1: maps are no masks. `the scene itself`, noised
to the level of each step, shows what the model's maps are when every object stands in its box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hookctl import Editor
from hookctl.demos.layouts import LayoutCase, draw_layout
from hookctl.demos.placing import Progress, Stack, boxes, compare, words
from hookctl.demos.shapes.render import drawn
from hookctl.demos.shapes.world import Scene
from hookctl.loop.images import encode
from hookctl.loop.noise import Noise
from hookctl.loop.state import State
from hookctl.recipes import BoxDiff, LayoutGuidance


class SceneItself(Editor):
    """Before every step the latents are those of the case's scene, at the level of the step."""

    def __init__(self, cases: Sequence[LayoutCase]) -> None:
        self.images = drawn([Scene(case.things, case.background) for case in cases])

    def begin(self, state: State) -> None:
        self.noise = state.latents.clone()
        self.scenes = torch.cat([encode(state.pipe, image) for image in self.images])

    def before(self, state: State) -> None:
        level = Noise(state.pipe.scheduler).level(state.clock.timestep)
        state.latents = level.mix(self.scenes.to(self.noise), self.noise)


METHODS: Mapping[str, Stack] = {
    "the scene itself": lambda cases: [SceneItself(cases)],
    "plain": lambda cases: [],
    "layout guidance": lambda cases: [
        LayoutGuidance(words(cases), boxes(cases), scale=60.0, stop=0.4)
    ],
    # The published fifth of a box is two cells of the smaller ones here: less than an object.
    "BoxDiff": lambda cases: [
        BoxDiff(words(cases), boxes(cases), top=0.8, scale=80.0, refinements=10)
    ],
}


def run(
    out: Path,
    seed: int = 0,
    seeds: int = 4,
    progress: Progress | None = None,
    model: str = "shapes",
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    rng = np.random.default_rng([seed, 5])
    cases = [draw_layout(rng, 2) for _ in range(seeds)]
    return compare("layout", out, cases, METHODS, seed, progress, model=model)
