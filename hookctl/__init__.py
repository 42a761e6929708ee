"""hookctl: attention control for diffusion models, at flash-attention speed."""

from __future__ import annotations

from typing import Any

from hookctl.address.regions import Region
from hookctl.attention.call import AttentionCall, Routing
from hookctl.editor import Claim, Editor
from hookctl.reading import Maps
from hookctl.session import Session, control

__version__ = "0.1.0"

__all__ = [
    "AttentionCall",
    "Claim",
    "Editor",
    "Maps",
    "Region",
    "Routing",
    "Session",
    "control",
    "load_shapes",
]


def load_shapes(**options: Any) -> Any:
    """The embedded pipeline: a small, truly trained StableDiffusionPipeline (see its card)."""
    from hookctl.demos.shapes.load import load_shapes

    return load_shapes(**options)
