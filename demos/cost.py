"""What drawing costs, counted where it is paid: rows that a denoiser evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Cost:
    """calls of a denoiser, the rows that they held, and those rows in pictures of `side` cells."""

    side: int
    calls: int = 0
    rows: int = 0
    pictures: float = 0.0

    def note(self, sample: Any) -> None:
        self.calls += 1
        self.rows += len(sample)
        self.pictures += len(sample) * sample.shape[-1] * sample.shape[-2] / self.side**2


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[Cost]:
    """Count the calls of a denoiser meanwhile."""
    config: Any = denoiser.config
    cost = Cost(int(config.sample_size))
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: cost.note(args[0] if args else kwargs["sample"]),
        with_kwargs=True,
    )
    try:
        yield cost
    finally:
        handle.remove()
