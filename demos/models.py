"""The embedded pipelines by name."""

from __future__ import annotations

from typing import Any

import hookctl

SHAPES, SHAPES_FLOW = "shapes", "shapes-flow"


def opened(model: str) -> Any:
    """The pipeline "shapes", or "shapes-flow": flow matching, with joint attention."""
    return hookctl.load_shapes(flow=model == SHAPES_FLOW)


def call_of(pipe: Any) -> dict[str, Any]:
    """What an embedded pipeline is called with besides: "shapes-flow" without the zero tokens that
    stand for a T5's, a quarter of its time with them."""
    return {"max_sequence_length": 0} if hasattr(pipe, "tokenizer_3") else {}
