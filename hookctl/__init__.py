"""hookctl: attention control for diffusion models, at flash-attention speed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hookctl import errors

if TYPE_CHECKING:
    from hookctl.address.regions import Region
    from hookctl.attention.call import AttentionCall, Routing
    from hookctl.editor import Claim, Editor
    from hookctl.maps import Maps
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
    "errors",
    "load_shapes",
]

# Where each name lives. torch and diffusers take seconds to import: a command's help, or a wrong
# option, must not wait for them.
_HOMES = {
    "AttentionCall": "hookctl.attention.call",
    "Claim": "hookctl.editor",
    "Editor": "hookctl.editor",
    "Maps": "hookctl.maps",
    "Region": "hookctl.address.regions",
    "Routing": "hookctl.attention.call",
    "Session": "hookctl.session",
    "control": "hookctl.session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_shapes(**options: Any) -> Any:
    """The embedded pipeline: a small, truly trained StableDiffusionPipeline (see its card)."""
    from hookctl.demos.shapes.load import load_shapes

    return load_shapes(**options)
