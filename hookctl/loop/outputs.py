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


def listed(output: Any) -> list[Tensor] | None:
    """The predictions of a denoiser that returns one for each row; None of others."""
    found = _predicted(output)
    return found if isinstance(found, list) else None


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


def first_rows(output: Any, own: int, rows: int) -> Any:
    """What a denoiser returned of the first `own` of its rows; rows: how many it was given.

    What stands beside the prediction (a sound's) is cut where it has an entry for each row.
    """
    prediction = prediction_of(output)
    if prediction is None:
        return output

    def cut(beside: Any) -> Any:
        return (
            beside[:own] if isinstance(beside, Tensor) and beside.shape[:1] == (rows,) else beside
        )

    if isinstance(output, tuple):
        return (prediction[:own], *map(cut, output[1:]))
    if isinstance(output, Tensor):
        return prediction[:own]
    every = {field.name: cut(getattr(output, field.name)) for field in fields(output)}
    return replace(output, **(every | {_name(output): prediction[:own]}))
