"""Two objects where their boxes are: layout guidance and BoxDiff against plain sampling.

Boxes are those of held-out scenes whose prompts do not say where things are exactly. share in box:
of the noun's attention; hits: objects found in their box.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hookctl.demos.layouts import draw_layout
from hookctl.demos.placing import Progress, Stack, boxes, compare, words
from hookctl.recipes import BoxDiff, LayoutGuidance

METHODS: Mapping[str, Stack] = {
    "plain": lambda cases: [],
    "layout guidance": lambda cases: [
        LayoutGuidance(words(cases), boxes(cases), scale=60.0, stop=0.4)
    ],
    "BoxDiff": lambda cases: [BoxDiff(words(cases), boxes(cases), scale=40.0, refinements=10)],
}


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    rng = np.random.default_rng([seed, 5])
    cases = [draw_layout(rng, 2) for _ in range(seeds)]
    return compare("layout", out, cases, METHODS, seed, progress)
