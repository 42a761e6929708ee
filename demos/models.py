"""The embedded pipelines by name."""

from __future__ import annotations

from typing import Any

import hookctl


def opened(model: str) -> Any:
    """The pipeline "shapes", or "shapes-flow": flow matching, with joint attention."""
    return hookctl.load_shapes(flow=model == "shapes-flow")
