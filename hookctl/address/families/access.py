"""The denoisers of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from hookctl.address.families.record import pipeline_of, uncompiled
from hookctl.errors import InputError

DENOISERS = ("unet", "transformer", "dit", "prior", "decoder")  # of pipelines that are not declared
_PREDICTED = ("out_channels", "out_visual_dim")


def denoisers_of(target: Any) -> tuple[tuple[str, nn.Module], ...]:
    """Every denoiser of a pipeline, the first one first; or the bare one itself.

    Each with the name that the paths of its sites begin with, "" for the first one. Raises
    InputError if there is none.
    """
    first, *others = named_denoisers(target)
    return (("", first[1]), *others)


def named_denoisers(target: Any) -> tuple[tuple[str, nn.Module], ...]:
    """Name and module of every denoiser that a pipeline steers through its steps.

    A bare denoiser is the one there is, named "". Raises InputError if there is none.
    """
    if isinstance(target, nn.Module):
        return (("", target),)
    record = pipeline_of(target)
    names = DENOISERS if record is None else tuple(record.calls)
    held = [(name, getattr(target, name, None)) for name in names]
    found = [(name, module) for name, module in held if isinstance(module, nn.Module)]
    if not found:
        raise InputError(
            f"target is a {type(target).__name__}, which holds no denoiser "
            f"({', '.join(names)}); give a pipeline or a torch module"
        )
    # Of a pipeline that is not declared one is known to be called, and which else is not.
    return tuple(found if record is not None else found[:1])


def denoiser_of(target: Any) -> nn.Module:
    """The first denoiser of a pipeline, or the bare denoiser itself.

    Raises InputError if there is none.
    """
    return denoisers_of(target)[0][1]


def own_channels(pipe: Any, denoiser: nn.Module) -> int | None:
    """Channels of a model input that are the latents', which come first and which the model
    predicts; None where the pipeline joins no images to them along the channels."""
    record = pipeline_of(pipe)
    if record is None or not record.joins_channels:
        return None
    config: Any = getattr(uncompiled(denoiser), "config", {})
    return next((config[name] for name in _PREDICTED if config.get(name) is not None), None)
