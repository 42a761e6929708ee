"""(backbone, skip) at each decoder concat of a UNet (FreeU, ScaleU).

A forward pre-hook of a decoder's residual block sees [backbone ; skip] joined on channels, after
any ControlNet residual was added to the skip; how many channels are backbone follows from the
blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.clock import Clock
from hookctl.address.rows import Rows


@dataclass(eq=False)
class FeatureCall:
    """One decoder concat.

    backbone, skip: [rows, channels, height, width], assign to change; block: index of the decoder
    block, place: of the concat inside it, order: counted over the decoder; resolution: relative
    to the latent.
    """

    backbone: Tensor
    skip: Tensor
    rows: Rows
    clock: Clock
    block: int
    place: int
    order: int
    resolution: Fraction


@dataclass(frozen=True, eq=False)
class Concat:
    """Where a decoder concatenates a skip connection."""

    module: nn.Module
    path: str
    backbone_channels: int
    block: int
    place: int
    order: int
    resolution: Fraction


def concats(denoiser: nn.Module) -> Iterator[Concat]:
    """The decoder concats of a UNet, in forward order; none on other models."""
    ups = getattr(denoiser, "up_blocks", None)
    if ups is None or not hasattr(denoiser, "mid_block"):
        return
    before = _out_channels(getattr(denoiser.mid_block, "resnets", None))
    order = 0
    for block, up in enumerate(ups):
        for place, resnet in enumerate(getattr(up, "resnets", ())):
            if before is not None:
                yield Concat(
                    resnet,
                    f"up_blocks.{block}.resnets.{place}",
                    before,
                    block,
                    place,
                    order,
                    Fraction(1, 2 ** (len(ups) - 1 - block)),
                )
            before = getattr(resnet, "out_channels", None)
            order += 1


def _out_channels(resnets: Any) -> int | None:
    return getattr(resnets[-1], "out_channels", None) if resnets else None


class ConcatPort:
    """The hook on one decoder concat: splits, hands over, joins again if anything changed."""

    def __init__(
        self, concat: Concat, edit: Callable[[Concat, Tensor, Tensor], tuple[Tensor, Tensor] | None]
    ) -> None:
        self.concat, self.edit = concat, edit
        self._handle = concat.module.register_forward_pre_hook(self._before)

    def remove(self) -> None:
        self._handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        joined = args[0]
        split = self.concat.backbone_channels
        edited = self.edit(self.concat, joined[:, :split], joined[:, split:])
        return None if edited is None else (torch.cat(edited, 1), *args[1:])
