"""What pipelines ask of their surroundings, where it is not there or too large to be drawn here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SMALLER = 256  # times fewer pixels than edit models ask for: 64 by 64 of a megapixel
SIDE = 64
_NEED_TORCHVISION = (
    "diffusers.models.transformers.transformer_cosmos",
    "diffusers.models.controlnets.controlnet_cosmos",
    "diffusers.pipelines.omnigen.processor_omnigen",
)


def furnish(kind: type) -> None:
    """Put what a class's module would have imported where it looks for it."""
    home: Any = sys.modules[kind.__module__]
    if not hasattr(home, "ftfy"):  # which repairs encodings, and some pipelines need
        home.ftfy = SimpleNamespace(fix_text=str)
    if "cosmos" not in home.__name__ and "omnigen" not in home.__name__:
        return
    if not hasattr(home, "torchvision"):
        home.torchvision = SimpleNamespace(transforms=TRANSFORMS)
    for name in _NEED_TORCHVISION:
        module: Any = importlib.import_module(name)
        if not hasattr(module, "transforms"):
            module.transforms = TRANSFORMS
        if name.startswith(home.__package__) and not hasattr(home, "OmniGenMultiModalProcessor"):
            home.OmniGenMultiModalProcessor = module.OmniGenMultiModalProcessor


@contextmanager
def smaller(kind: type, steady: bool = False) -> Iterator[None]:
    """Edit models, which resize what they are given to a megapixel, make it small.

    steady: given images are encoded as their means, so that they do not follow the seed.
    """
    home: Any = sys.modules[kind.__module__]
    with ExitStack() as patches:
        if hasattr(home, "calculate_dimensions"):
            size: Callable[..., Any] = home.calculate_dimensions
            patches.enter_context(
                mock.patch.object(
                    home, "calculate_dimensions", lambda area, ratio: size(area / SMALLER, ratio)
                )
            )
        sizes: Any = sys.modules.get(f"{home.__package__}.image_processor")
        if hasattr(sizes, "BUCKETS"):
            patches.enter_context(mock.patch.dict(sizes.BUCKETS, {1024: [(SIDE, SIDE)]}))
        if steady:
            patches.enter_context(mock.patch.object(home, "retrieve_latents", _mean))
        yield


def _mean(encoded: Any, **_: Any) -> Tensor:
    mean: Tensor = encoded.latent_dist.mode()
    return mean


# -- the few functions of torchvision that Cosmos and OmniGen call ---------------------------------


def _resize(x: Tensor, size: list[int], interpolation: str) -> Tensor:
    return F.interpolate(x, size=size, mode=interpolation)


def _to_tensor(image: Image.Image) -> Tensor:
    """[3, height, width] in 0..1"""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255


def _compose(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def all_of_them(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return x

    return all_of_them


def _normalize(mean: list[float], std: list[float], inplace: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


TRANSFORMS = SimpleNamespace(
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    functional=SimpleNamespace(resize=_resize, to_tensor=_to_tensor),
    Compose=_compose,
    Lambda=lambda function: function,
    ToTensor=lambda: _to_tensor,
    Normalize=_normalize,
)
