"""What editors add to the encoder of a denoiser, as a ControlNet does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.errors import InputError
from hookctl.loop.state import State


@dataclass(frozen=True, eq=False)
class Residuals:
    """What is added to the encoder of a denoiser (ControlNet, arXiv 2302.05543).

    skips: of each skip connection from the first, [rows, channels, height, width] (of a
    transformer: of its blocks, in order); middle: to the middle block's output, None for nothing.
    """

    skips: Sequence[Tensor]
    middle: Tensor | None = None

    def __add__(self, other: Residuals) -> Residuals:
        if len(self.skips) != len(other.skips):
            raise InputError(
                f"residuals for {len(self.skips)} and for {len(other.skips)} skip connections "
                "can't be added: they are of different models"
            )
        parts = [one for one in (self.middle, other.middle) if one is not None]
        middle = sum(parts[1:], parts[0]) if parts else None
        return Residuals([a + b for a, b in zip(self.skips, other.skips, strict=True)], middle)


# Arguments of a denoiser that residuals are given by: of the skips, and of the middle.
_ARGUMENTS = (
    ("down_block_additional_residuals", "mid_block_additional_residual"),
    ("block_controlnet_hidden_states", None),
    ("controlnet_block_samples", None),
)


def residual_arguments(parameters: Iterable[str]) -> tuple[str, str | None] | None:
    """By which arguments a denoiser, of these parameters, takes residuals; None for by none."""
    known = set(parameters)
    return next((pair for pair in _ARGUMENTS if pair[0] in known), None)


def add_residuals(state: State, found: Residuals | None) -> None:
    """An editor adds to the encoder of a call."""
    if found is not None:
        state.residuals = found if state.residuals is None else state.residuals + found


def with_residuals(state: State, parameters: Iterable[str]) -> dict[str, Any]:
    """The arguments of a call with what editors add to the encoder."""
    found: Residuals | None = state.residuals
    names = residual_arguments(parameters)
    if found is None or names is None:
        return state.kwargs
    skips, middle = names
    own = state.kwargs.get(skips)
    if own is not None:
        found = Residuals(own, state.kwargs.get(middle) if middle else None) + found
    changed = {**state.kwargs, skips: tuple(found.skips)}
    if middle is not None:
        none = torch.zeros((), dtype=found.skips[-1].dtype, device=found.skips[-1].device)
        changed[middle] = none if found.middle is None else found.middle
    return changed
