"""NaN and infinity on the way of a run: found once a step, and traced to where they began."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.errors import InputError, NotFiniteError
from hookctl.loop.state import State

Trail = Sequence[tuple[str, Any]]  # what a step is made of in its order: who made it, the tensor


def is_finite(x: Any) -> bool:
    """Whether a tensor, or a list of them, holds numbers alone; whatever is none of floats does."""
    if isinstance(x, list):
        return all(map(is_finite, x))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return True
    return bool(torch.isfinite(x.detach()).all())


def check_latents(latents: Any) -> None:
    """Raise InputError if the latents that a run starts from hold NaN or infinity."""
    if not is_finite(latents):
        every = latents if isinstance(latents, list) else [latents]
        bad = sum(int((~torch.isfinite(one.detach())).sum()) for one in every)
        raise InputError(
            f"latents hold {bad} values that are NaN or infinite (of "
            f"{sum(one.numel() for one in every)}); "
            "check the latents= given, or what produced them"
        )


def check_step(state: State, trail: Trail) -> None:
    """Raise NotFiniteError, with where it began, unless what a step ends with is finite.

    Costs one reduction of the step's latents, which on a GPU are waited for.
    """
    if not trail or is_finite(trail[-1][1]):
        return
    who = next(name for name, x in trail if not is_finite(x))
    raise NotFiniteError(
        f"NaN or infinity at step {state.clock.step}, first in {who}{_cause(state, who)}. "
        "check_finite=False of control(...) leaves this check out"
    )


PREDICTION = "the prediction that the scheduler is given"


def _cause(state: State, who: str) -> str:
    if who != PREDICTION:
        return ""
    bad = [name for name, x in state.kwargs.items() if not is_finite(x)]
    if bad:
        return f": the denoiser was given such values in {', '.join(bad)}"
    broken = next((n for n, p in state.denoiser.named_parameters() if not is_finite(p)), None)
    if broken is not None:
        return f": the denoiser's weights hold such values, as in {broken}"
    dtype = state.dtype if state.sample in state.kwargs else "its dtype"
    return (
        f": an editor's attention, the guidance scale, or a denoiser that overflows in {dtype} may "
        "have made them"
    )
