"""The networks of GLIGEN and InstanceDiffusion out of checkpoints, sized by the model's blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.errors import InputError
from hookctl.learned.fit import load_into
from hookctl.learned.modules.gated_attention import GatedSelfAttention

M = TypeVar("M", bound=nn.Module)

_FUSER = ".fuser."


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without it."""
    return {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}


def filled(
    make: Callable[[Mapping[str, tuple[int, ...]]], M], tensors: Mapping[str, Tensor], who: str
) -> M:
    """The module of some weights: made by their shapes, without weights of its own. Raises
    InputError for weights that it has no place for, or lacks."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            module = make(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{who}: the file lacks {error} or has it in another shape") from None
    load_into(module, tensors, who=who)
    return module


def fusers_of(tensors: Mapping[str, Tensor], target: Any) -> dict[str, GatedSelfAttention]:
    """The gated layers of a checkpoint by the path of their transformer block.

    tensors: by diffusers' names; target: the pipeline or denoiser, whose blocks tell the number of
    heads. Raises InputError for a layer of a block that the model lacks.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, found, name = key.partition(_FUSER)
        if found:
            groups.setdefault(path, {})[name] = tensor
    modules = dict(uncompiled(denoiser_of(target)).named_modules())
    layers = {}
    for path, weights in groups.items():
        attention = getattr(modules.get(path), "attn1", None)
        if attention is None:
            raise InputError(
                f"{path}: the checkpoint has a gated layer for this transformer block, and the "
                "model has no such block; it is for another model"
            )
        made = partial(_layer, heads=int(attention.heads))
        layers[path] = filled(made, weights, f"{path}.fuser")
    return layers


def _layer(shapes: Mapping[str, tuple[int, ...]], heads: int) -> GatedSelfAttention:
    width, token_width = shapes["linear.weight"]
    return GatedSelfAttention(width, token_width, heads)


F = TypeVar("F", bound=Callable[..., Any])


def options_of(editor: type) -> Callable[[F], F]:
    """Gives a function (checkpoint, pipe, **options) the keywords of an editor's constructor."""

    def decorate(function: F) -> F:
        own = list(inspect.signature(function).parameters.values())[:2]
        keywords = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for parameter in list(inspect.signature(editor).parameters.values())[1:]
        ]
        function.__signature__ = inspect.Signature([*own, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate
