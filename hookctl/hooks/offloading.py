"""Models whose weights are elsewhere until they run, by accelerate's hooks (diffusers' too)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hookctl.errors import InputError


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks bring a model's weights where its inputs are, when it runs."""
    return getattr(model, "_hf_hook", None) is not None


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; the CPU for one without weights."""
    for module in model.modules():  # that of the whole may say nothing
        hook: Any = getattr(module, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_held(model: nn.Module, name: str) -> None:
    """Raise InputError for weights on the meta device, unless hooks bring them.

    name: what the error calls the model.
    """
    if is_offloaded(model):
        return
    empty = next((path for path, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise InputError(
            f"{name}: weights such as {empty} are on the meta device, which holds no values; load "
            "the model again, since .to('meta') dropped them"
        )
