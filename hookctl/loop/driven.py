"""What a program says of a denoiser call that it makes itself: who, when and how scaled.

A pipeline's loop has to be read from outside (rows from batch sizes, turns from timesteps); a
program knows. It says so while it makes the call, and the hooks believe it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hookctl.address.clock import Clock
from hookctl.address.families import uncompiled
from hookctl.address.rows import Rows
from hookctl.loop.state import Scaling

Settle = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Driven:
    """One denoiser call of a program, and the scheduler's step after it.

    program: whose call it is, one object for all calls of a run; prompts, images_per_prompt,
    encoding, rows, clock, scaling: as in `State`. stepping: a step follows; without one
    (an inversion, a gradient) the editors that change the model act, not those that change
    latents and predictions. settle: changes what the step returns, once.
    """

    program: Any
    denoiser: nn.Module
    prompts: tuple[str, ...]
    images_per_prompt: int
    encoding: dict[str, Any]
    rows: Rows
    clock: Clock
    scaling: Scaling | None = None
    stepping: bool = False
    settle: Settle | None = None


_now: ContextVar[Driven | None] = ContextVar("driven", default=None)


@contextmanager
def driving(call: Driven) -> Iterator[Driven]:
    """Say meanwhile that the calls of its denoiser are this one."""
    token = _now.set(call)
    try:
        yield call
    finally:
        _now.reset(token)


def driven(denoiser: nn.Module) -> Driven | None:
    """The program's call that a call of this denoiser is, None if no program drives it."""
    call = _now.get()
    return call if call is not None and call.denoiser is uncompiled(denoiser) else None


def settled(latents: Tensor) -> Tensor:
    """What a step returned, as its program wants it.

    The program's change comes once and before any editor's `after`, whoever ends the step.
    """
    call = _now.get()
    if call is None or call.settle is None:
        return latents
    settle, call.settle = call.settle, None
    return settle(latents)
