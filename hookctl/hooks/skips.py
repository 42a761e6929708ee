"""(backbone, skip) at each decoder concat of a UNet (FreeU, ScaleU).

A forward pre-hook of a decoder's residual block sees [backbone ; skip] joined on channels, after
any ControlNet residual was added to the skip; how many channels are backbone follows from the
blocks before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.hooks.compiled import Ports, opaque_operator
from hookctl.hooks.forward import hook_before


@dataclass(frozen=True, eq=False)
class Concat:
    """Where a decoder concatenates a skip connection.

    block: index of the decoder block; place: of the concat inside it; order: counted over the
    decoder; resolution: relative to the latent.
    """

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
            before = _channels(resnet)
            order += 1


def _out_channels(resnets: Any) -> int | None:
    return _channels(resnets[-1]) if resnets else None


def _channels(resnet: nn.Module) -> int | None:
    """Output channels of a residual block; in video models a spatial one holds the number."""
    spatial = getattr(resnet, "spatial_res_block", resnet)
    return getattr(spatial, "out_channels", None)


Edit = Callable[[Concat, Tensor, Tensor], "tuple[Tensor, Tensor] | None"]


class ConcatPort:
    """The hook on one decoder concat: splits, hands over, joins again if anything changed.

    Blocks give their resnet the concat by position or by name (AnimateDiff: `input_tensor=`); it is
    the first argument of its forward.
    """

    def __init__(self, concat: Concat, edit: Edit) -> None:
        self.concat, self.edit = concat, edit
        self.name, self.traced = _ports.register(self, concat.path), False
        parameters = list(inspect.signature(type(concat.module).forward).parameters)
        self._argument = parameters[1]  # after `self`
        self._handles: list[Any] = []

    def install(self) -> None:
        self._handles.append(hook_before(self.concat.module, self._before))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs[self._argument]
        if torch.compiler.is_compiling():
            joined = _features_operator(given, self.name)
        else:
            joined = self.joined(given)
            if joined is given:
                return None
        if args:
            return (joined, *args[1:]), kwargs
        return args, {**kwargs, self._argument: joined}

    def joined(self, joined: Tensor) -> Tensor:
        """The concat with its parts edited; the same tensor if nothing changed."""
        split = self.concat.backbone_channels
        edited = self.edit(self.concat, joined[:, :split], joined[:, split:])
        return joined if edited is None else torch.cat(edited, 1)


# -- torch.compile ---------------------------------------------------------------------------------

_ports = Ports()


def _evaluate(joined: Tensor, port: str) -> Tensor:
    owner = _ports.get(port)
    return joined if owner is None else owner.joined(joined)


_features_operator = opaque_operator(
    "features",
    "Tensor joined, str port",
    _evaluate,
    lambda joined, port: tuple(joined.shape),
    _ports,
)
