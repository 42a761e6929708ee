"""Learned modules: official weights, as they are published, become editors.

    grounding = hookctl.learned.load("gligen.bin", pipe, boxes=..., phrases=...)
    with hookctl.control(pipe, grounding):
        pipe("a photo")

loading            a file, read, recognised, checked and attached
files, reading     where weights are, and how they are read without running what is in a file
names              LDM's and training's names become diffusers'
recognise, kinds   what a file is, by its names and shapes
fit                weights into modules, or what does not fit and why
modules            the networks themselves, with their official names and shapes
gligen, instance_diffusion      editors that ground; grounding: what they share
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookctl.learned.gligen import GLIGEN
    from hookctl.learned.instance_diffusion import InstanceDiffusion
    from hookctl.learned.instances import Instance
    from hookctl.learned.loading import load

__all__ = ["GLIGEN", "Instance", "InstanceDiffusion", "load"]

# Where each name is defined: torch need not be imported to know where weights are.
_HOMES = {
    "GLIGEN": "hookctl.learned.gligen",
    "Instance": "hookctl.learned.instances",
    "InstanceDiffusion": "hookctl.learned.instance_diffusion",
    "load": "hookctl.learned.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
