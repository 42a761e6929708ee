"""What a model offers to control, what a run really caught, and pictures and tables of both.

survey(pipe)            its sites, its family's facts, which sites can be caught: a `Survey`
probe(pipe, ...)        a run of it, and which sites were really caught: a `Probed`
table, markdown_table   rows as text; html_table, html_lines, html_image for a notebook
show                    heat maps, overlays, grids and strips of images
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hookctl.inspect.notebook import html_image, html_lines, html_table
from hookctl.inspect.tables import markdown_table, table

if TYPE_CHECKING:
    from hookctl.inspect import show
    from hookctl.inspect.caught import Probed, probe
    from hookctl.inspect.model import Survey, pipeline_arguments, survey

__all__ = [
    "Probed",
    "Survey",
    "html_image",
    "html_lines",
    "html_table",
    "markdown_table",
    "pipeline_arguments",
    "probe",
    "show",
    "survey",
    "table",
]

# These need torch, for which a table must not wait.
_HOMES = {
    "Probed": "hookctl.inspect.caught",
    "Survey": "hookctl.inspect.model",
    "pipeline_arguments": "hookctl.inspect.model",
    "probe": "hookctl.inspect.caught",
    "survey": "hookctl.inspect.model",
}


def __getattr__(name: str) -> Any:
    if name == "show":
        return import_module("hookctl.inspect.show")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
