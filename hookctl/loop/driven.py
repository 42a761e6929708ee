"""Denoiser calls that a program or an editor makes itself: what it says of them.

A pipeline's loop has to be read from outside (rows from batch sizes, steps from timesteps); a
program knows, and an editor that asks the denoiser again knows what for. They say so while they
make the call, and the hooks believe it.
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

Adjust = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Scaling:
    """How the scheduler made the model input of a step from the latents.

    latents: [rows, ...] as the pipeline handed them over; again: does the same to others.
    """

    latents: Tensor
    again: Callable[[Tensor], Tensor]


# -- a program's calls -----------------------------------------------------------------------------


@dataclass(eq=False)
class Driven:
    """One denoiser call of a program, and the scheduler's step after it.

    program: whose call it is, one object for all calls of a run; prompts, images_per_prompt,
    encoding, rows, clock, scaling: as in `State`. stepping: a step follows; without one
    (an inversion, a gradient) the editors that change the model act, not those that change
    latents and predictions. adjust: changes what the step returns, once.
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
    adjust: Adjust | None = None


_driven: ContextVar[Driven | None] = ContextVar("driven", default=None)


@contextmanager
def driving(call: Driven) -> Iterator[Driven]:
    """Say meanwhile that the calls of its denoiser are this one."""
    token = _driven.set(call)
    try:
        yield call
    finally:
        _driven.reset(token)


def driven(denoiser: nn.Module) -> Driven | None:
    """The program's call that a call of this denoiser is, None if no program drives it."""
    call = _driven.get()
    return call if call is not None and call.denoiser is uncompiled(denoiser) else None


def adjusted(latents: Tensor) -> Tensor:
    """What a step returned, as its program wants it.

    The program's change comes once and before any editor's `after`, whoever ends the step.
    """
    call = _driven.get()
    if call is None or call.adjust is None:
        return latents
    adjust, call.adjust = call.adjust, None
    return adjust(latents)


def abandon() -> None:
    """No call is anybody's in this context, whatever an interrupt left."""
    _driven.set(None)
    _reading.set(None)


# -- an editor's calls -----------------------------------------------------------------------------


@dataclass(eq=False)
class Reading:
    """A denoiser call of an editor: the editors that change the model act in it as ever.

    reader: the editor whose read-outs are handed out (others read the pipeline's own calls only),
    None for nobody's.
    call: kept here while a backward pass may recompute parts of it.
    """

    denoiser: nn.Module
    reader: object | None
    call: Any = None


_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading_in(reading: Reading) -> Iterator[Reading]:
    """Say meanwhile that the calls of its denoiser are made for this reading."""
    token = _reading.set(reading)
    try:
        yield reading
    finally:
        _reading.reset(token)
        reading.call = None  # it knows the reading: a circle would keep the graph alive


def reading_of(denoiser: nn.Module) -> Reading | None:
    """The reading that a call of this denoiser is made for, None if it is not."""
    reading = _reading.get()
    return reading if reading is not None and reading.denoiser is uncompiled(denoiser) else None
