"""What a denoiser returns, and the prediction in it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def prediction_of(output: Any) -> Tensor | None:
    """The prediction in what a denoiser returns: a tensor, a tuple or an output object."""
    found = _predicted(output)
    return found if isinstance(found, Tensor) else None


def stacked(output: Any) -> Tensor | None:
    """As `prediction_of`, also of a denoiser that returns a list of images of one size."""
    found = _predicted(output)
    if isinstance(found, list) and all(isinstance(one, Tensor) for one in found):
        return torch.stack(found) if len({one.shape for one in found}) == 1 else None
    return prediction_of(output)


def cut(output: Any, count: int) -> Any:
    """What a denoiser returned, of its first rows alone; so what stands beside the prediction and
    has as many rows, such as a sound's."""
    found = _predicted(output)
    if not isinstance(found, list | Tensor):
        return output

    def first(beside: Any) -> Any:
        rows = isinstance(beside, Tensor) and beside.shape[:1] == (len(found),)
        return beside[:count] if rows else beside

    if isinstance(output, tuple):
        output = tuple(map(first, output))
    elif is_dataclass(output) and not isinstance(output, type):
        beside = {field.name: first(getattr(output, field.name)) for field in fields(output)}
        output = replace(output, **beside)
    return with_prediction(output, found[:count])


def _predicted(output: Any) -> Any:
    if isinstance(output, tuple):
        return output[0]
    return getattr(output, _name(output)) if is_dataclass(output) else output


def _name(output: Any) -> str:
    """The field of an output object that holds the prediction."""
    return "sample" if hasattr(output, "sample") else fields(output)[0].name


def predictions(output: Any) -> list[Tensor]:
    """The tensors that a prediction is made of; some denoisers return one for each image."""
    found = _predicted(output)
    return [x for x in (found if isinstance(found, list) else [found]) if isinstance(x, Tensor)]


def with_prediction(output: Any, prediction: Tensor | list[Tensor]) -> Any:
    """What a denoiser returned, with another prediction in its place."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return replace(output, **{_name(output): prediction})
