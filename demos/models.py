"""The embedded pipelines by name, and what scripts have in common that draw on either."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import hookctl
from hookctl.inspect import markdown_table

SHAPES, SHAPES_FLOW = "shapes", "shapes-flow"


def opened(model: str) -> Any:
    """The pipeline "shapes", or "shapes-flow": flow matching, with joint attention."""
    pipe = hookctl.load_shapes(flow=model == SHAPES_FLOW)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(pipe: Any) -> dict[str, Any]:
    """What an embedded pipeline is called with besides: "shapes-flow" without the zero tokens that
    stand for a T5's, a quarter of its time with them."""
    return {"max_sequence_length": 0} if hasattr(pipe, "tokenizer_3") else {}


def script(description: str | None) -> argparse.ArgumentParser:
    """The command line of a script that measures on either pipeline; description: its docstring."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--model", choices=(SHAPES, SHAPES_FLOW), default=SHAPES)
    return parser


def figures_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Method -> figure -> value as a table, a line for each method."""
    columns = list(next(iter(found.values())))
    rows = [[name, *(f"{value:.2f}" for value in of.values())] for name, of in found.items()]
    return markdown_table(rows, ["", *columns])
