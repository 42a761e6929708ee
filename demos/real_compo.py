"""RealCompo: the plain model, the same model under layout guidance, and the mixture of both.

The mixture should keep the layout model's boxes and the text model's objects: box IoU against
attributes (pattern and size as the prompt says). The layout model gets no steps alone, as in the
paper's style setting: a guidance as strong as this one breaks some objects in the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hookctl.demos.layouts import LayoutCase, draw_layout
from hookctl.demos.placing import Progress, Stack, boxes, compare, words
from hookctl.recipes import LayoutGuidance, RealCompo


def guidance(cases: Sequence[LayoutCase]) -> LayoutGuidance:
    return LayoutGuidance(words(cases), boxes(cases), scale=60.0, stop=0.6)


METHODS: Mapping[str, Stack] = {
    "text model": lambda cases: [],
    "layout model": lambda cases: [guidance(cases)],
    "RealCompo": lambda cases: [RealCompo(words(cases), boxes(cases), guidance(cases), alone=0.0)],
}


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    rng = np.random.default_rng([seed, 7])
    cases = [draw_layout(rng, 2) for _ in range(seeds)]
    return compare("real_compo", out, cases, METHODS, seed, progress)
