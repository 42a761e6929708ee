"""Tiny edit models, which see reference images beside what they draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

import tests.zoo as zoo
from tests.zoo.wild import WILD

PICTURES = (Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 128), "blue"))
CAT = "a red cat"


@dataclass(frozen=True)
class EditModel:
    """A pipeline that takes references.

    make: a new one; draw: the latents of some prompts, one seed for all; references: how many a
    call gives; grids: of the target and the references; several: whether it draws several prompts
    at once.
    """

    make: Callable[[], Any]
    draw: Callable[..., Tensor]
    references: int
    grids: tuple[tuple[int, int], ...]
    several: bool = True


def _klein(pipe: Any, prompts: Sequence[str] = (CAT,), steps: int = 2, **call: Any) -> Tensor:
    given = {"image": list(PICTURES), "generator": _alike(len(prompts)), **call}
    return zoo.PIPELINES["flux2_klein"].run(pipe, list(prompts), steps=steps, **given)


def _alike(count: int) -> list[torch.Generator]:
    """The same noise for every prompt."""
    return [torch.Generator().manual_seed(0) for _ in range(count)]


def _wild(name: str) -> Callable[..., Tensor]:
    def draw(pipe: Any, prompts: Sequence[str] = (CAT,)) -> Tensor:
        out = WILD[name].draw(pipe, list(prompts), ["blurry"] * len(prompts), [0] * len(prompts))
        latents: Tensor = out.images
        return latents

    return draw


EDITS: dict[str, EditModel] = {
    "kontext": EditModel(
        WILD["FluxKontextPipeline"].make, _wild("FluxKontextPipeline"), 1, ((4, 4), (16, 16))
    ),
    "qwen_edit": EditModel(
        WILD["QwenImageEditPlusPipeline"].make,
        _wild("QwenImageEditPlusPipeline"),
        1,
        ((4, 4), (8, 8)),
        several=False,
    ),
}
if hasattr(diffusers, "Flux2KleinPipeline") and "flux2_klein" in zoo.PIPELINES:
    EDITS["klein"] = EditModel(
        zoo.PIPELINES["flux2_klein"].make, _klein, 2, ((8, 8), (4, 4), (8, 4))
    )
