"""(backbone, skip) at each decoder concat of a UNet (FreeU, ScaleU).

A forward pre-hook of a decoder's residual block sees [backbone ; skip] joined on channels, after
any ControlNet residual was added to the skip; how many channels are backbone follows from the
blocks before it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.clock import Clock
from hookctl.address.rows import Rows
from hookctl.loop.state import State


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
            before = _channels(resnet)
            order += 1


def _out_channels(resnets: Any) -> int | None:
    return _channels(resnets[-1]) if resnets else None


def _channels(resnet: nn.Module) -> int | None:
    """Output channels of a residual block; in video models a spatial one holds the number."""
    spatial = getattr(resnet, "spatial_res_block", resnet)
    return getattr(spatial, "out_channels", None)


def edit_features(
    concat: Concat,
    backbone: Tensor,
    skip: Tensor,
    state: State,
    edits: Iterable[Callable[[FeatureCall], None]],
) -> tuple[Tensor, Tensor] | None:
    """Show a concat to what edits it; both parts, or None if nobody changed any."""
    call = FeatureCall(
        backbone,
        skip,
        state.rows,
        state.clock,
        concat.block,
        concat.place,
        concat.order,
        concat.resolution,
    )
    for edit in edits:
        edit(call)
    if call.backbone is backbone and call.skip is skip:
        return None
    return call.backbone, call.skip


Edit = Callable[[Concat, Tensor, Tensor], "tuple[Tensor, Tensor] | None"]


class ConcatPort:
    """The hook on one decoder concat: splits, hands over, joins again if anything changed."""

    def __init__(self, concat: Concat, edit: Edit) -> None:
        self.concat, self.edit = concat, edit
        self.name, self.traced = f"{concat.path}#{next(_numbers)}", False
        _ports[self.name] = self
        self._handle = concat.module.register_forward_pre_hook(self._before)

    def remove(self) -> None:
        self._handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if torch.compiler.is_compiling():
            return (torch.ops.hookctl.features(args[0], self.name), *args[1:])
        joined = self.joined(args[0])
        return None if joined is args[0] else (joined, *args[1:])

    def joined(self, joined: Tensor) -> Tensor:
        """The concat with its parts edited; the same tensor if nothing changed."""
        split = self.concat.backbone_channels
        edited = self.edit(self.concat, joined[:, :split], joined[:, split:])
        return joined if edited is None else torch.cat(edited, 1)


# -- torch.compile: an opaque operator, as for attention (`attention/compiled.py`) ----------------

_ports: weakref.WeakValueDictionary[str, ConcatPort] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def _evaluate(joined: Tensor, port: str) -> Tensor:
    owner = _ports.get(port)
    return joined if owner is None else owner.joined(joined)


@torch.library.custom_op("hookctl::features", mutates_args=())
def _features_op(joined: Tensor, port: str) -> Tensor:
    out = _evaluate(joined, port)
    return out.clone() if out is joined else out.contiguous()  # an operator returns no input


@_features_op.register_fake
def _(joined, port):
    if port in _ports:
        _ports[port].traced = True
    return torch.empty_like(joined)


@torch.library.custom_op("hookctl::features_backward", mutates_args=())
def _features_backward_op(grad: Tensor, joined: Tensor, port: str) -> Tensor:
    leaf = joined.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(_evaluate(leaf * 1, port), leaf, grad)
    return found.contiguous()


@_features_backward_op.register_fake
def _(grad, joined, port):
    return torch.empty(joined.shape, dtype=joined.dtype, device=joined.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.port = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.hookctl.features_backward(grad, *ctx.saved_tensors, ctx.port), None


_features_op.register_autograd(_backward, setup_context=_save)
