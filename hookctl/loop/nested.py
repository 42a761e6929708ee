"""What an editor says of a denoiser call that it makes: whose read-outs it serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from hookctl.address.families import uncompiled


@dataclass(eq=False)
class Reading:
    """A denoiser call of an editor: the editors that change the model act in it as ever.

    reader: the editor whose read-outs are handed out (others read the pipeline's own calls only),
    None for nobody's.
    call: kept here while a backward pass may recompute parts of it.
    """

    denoiser: nn.Module
    reader: Any
    call: Any = None


_now: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading_in(reading: Reading) -> Iterator[Reading]:
    """Say meanwhile that the calls of its denoiser are made for this reading."""
    token = _now.set(reading)
    try:
        yield reading
    finally:
        _now.reset(token)
        reading.call = None  # it knows the reading: a circle would keep the graph alive


def reading_of(denoiser: nn.Module) -> Reading | None:
    """The reading that a call of this denoiser is made for, None if it is not."""
    reading = _now.get()
    return reading if reading is not None and reading.denoiser is uncompiled(denoiser) else None
