"""Three objects and none left out: Attend-and-Excite against plain sampling.

missing: share of the objects of the prompt that the detector finds nowhere in the image;
weakest_noun: the peak of the map of the noun that is least attended to, which the method raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hookctl.demos.layouts import draw_layout
from hookctl.demos.placing import Progress, Stack, compare, words
from hookctl.recipes import AttendAndExcite

METHODS: Mapping[str, Stack] = {
    "plain": lambda cases: [],
    "Attend-and-Excite": lambda cases: [AttendAndExcite(words(cases), refinements=10)],
}


def run(
    out: Path,
    seed: int = 0,
    seeds: int = 4,
    progress: Progress | None = None,
    model: str = "shapes",
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    rng = np.random.default_rng([seed, 6])
    cases = [draw_layout(rng, 3) for _ in range(seeds)]
    return compare(
        "attend_and_excite", out, cases, METHODS, seed, progress, boxed=False, model=model
    )
