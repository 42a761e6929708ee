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
lora, lora_files                low-rank changes, kept to regions and words
ip_adapter, face_id, instant_id     editors that show images and faces; adapter: their weights
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookctl.learned.face_id import FaceID
    from hookctl.learned.faces import face_analysis, find_face
    from hookctl.learned.gligen import GLIGEN
    from hookctl.learned.image_prompts import ImagePrompt
    from hookctl.learned.instance_diffusion import InstanceDiffusion
    from hookctl.learned.instances import Instance
    from hookctl.learned.instant_id import InstantID
    from hookctl.learned.ip_adapter import IPAdapter
    from hookctl.learned.loading import load
    from hookctl.learned.lora import LoRA
    from hookctl.learned.people import Person

__all__ = [
    "FaceID",
    "GLIGEN",
    "IPAdapter",
    "ImagePrompt",
    "Instance",
    "InstanceDiffusion",
    "InstantID",
    "LoRA",
    "Person",
    "face_analysis",
    "find_face",
    "load",
]

# Where each name is defined: torch need not be imported to know where weights are.
_HOMES = {
    "FaceID": "hookctl.learned.face_id",
    "GLIGEN": "hookctl.learned.gligen",
    "IPAdapter": "hookctl.learned.ip_adapter",
    "ImagePrompt": "hookctl.learned.image_prompts",
    "Instance": "hookctl.learned.instances",
    "InstanceDiffusion": "hookctl.learned.instance_diffusion",
    "InstantID": "hookctl.learned.instant_id",
    "LoRA": "hookctl.learned.lora",
    "Person": "hookctl.learned.people",
    "face_analysis": "hookctl.learned.faces",
    "find_face": "hookctl.learned.faces",
    "load": "hookctl.learned.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
