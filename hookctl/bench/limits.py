"""What a device can do at best: measured rates, and the time under which no program can be."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from hookctl.bench.measure import seconds_of


@dataclass(frozen=True)
class Limits:
    """Measured ceilings: floating-point operations a second of a large matrix product, and bytes a
    second of a large copy (read and written)."""

    flops: float
    bytes: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Limits:
        side = 1024 if device.type == "cpu" else 8192
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = min(seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(5))
        many = torch.empty(2**25 if device.type == "cpu" else 2**28, device=device)
        target = torch.empty_like(many)
        copies = [seconds_of(lambda: target.copy_(many), device) for _ in range(5)]
        moved = 2 * many.numel() * many.element_size()
        return cls(2 * side**3 / product, moved / statistics.median(copies))

    def seconds(self, flops: float, traffic: float) -> float:
        """The larger of the times for the arithmetic and for the memory traffic."""
        return max(flops / self.flops, traffic / self.bytes)
