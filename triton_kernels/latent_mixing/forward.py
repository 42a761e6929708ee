"""The mixtures of latents by their kernels, on a GPU or in the interpreter, without gradients.

Kernels read contiguous [rows, channels, places]; a program has some places of one row.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, jit, tl
from hookctl.kernels.common.launch import Specimen, cdiv
from hookctl.kernels.common.launch_tables import MIXING, entry, needed, tile_for


@jit
def _between(a, b, share):
    """a where the share is 0 and b where it is 1, both to the bit."""
    return tl.where(share < 0.5, a + share * (b - a), b - (1.0 - share) * (b - a))


@jit
def _blend_kernel(
    x_ptr, sources_ptr, mask_ptr, out_ptr, channels, places, HARD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * P + tl.arange(0, P)
    exists = p < places
    source = tl.load(sources_ptr + row)
    share = tl.load(mask_ptr + row * places + p, mask=exists, other=0)
    for c in range(0, channels):
        x = tl.load(x_ptr + (row * channels + c) * places + p, mask=exists)
        y = tl.load(x_ptr + (source * channels + c) * places + p, mask=exists)
        if HARD:
            out = tl.where(share != 0, x, y)
        else:
            out = _between(y.to(tl.float32), x.to(tl.float32), share.to(tl.float32))
        at = out_ptr + (row * channels + c) * places + p
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=exists)


@jit
def _merge_kernel(
    x_ptr, masks_ptr, out_ptr, rows, channels, places, MASKED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1).to(tl.int64)
    exists = p < places
    out = tl.load(x_ptr + c * places + p, mask=exists).to(tl.float32)
    for row in range(1, rows):
        x = tl.load(x_ptr + (row * channels + c) * places + p, mask=exists).to(tl.float32)
        if MASKED:
            share = tl.load(masks_ptr + (row - 1) * places + p, mask=exists).to(tl.float32)
            out = _between(out, x, share)
        else:
            out += x
    if not MASKED:
        out /= rows
    tl.store(out_ptr + c * places + p, out.to(out_ptr.dtype.element_ty), mask=exists)


@jit
def _mix_kernel(a_ptr, b_ptr, d_ptr, out_ptr, channels, places, P: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * P + tl.arange(0, P)
    exists = p < places
    share = tl.sigmoid(tl.load(d_ptr + row * places + p, mask=exists).to(tl.float32))
    for c in range(0, channels):
        at = (row * channels + c) * places + p
        a = tl.load(a_ptr + at, mask=exists).to(tl.float32)
        b = tl.load(b_ptr + at, mask=exists).to(tl.float32)
        out = _between(b, a, share)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=exists)


@jit
def _change(d_ptr, grad_ptr, a_ptr, b_ptr, row, p, channels, places, rate):
    """d at some places of a row, and what a gradient step takes from it."""
    exists = p < places
    d = tl.load(d_ptr + row * places + p, mask=exists, other=0.0).to(tl.float32)
    along = tl.zeros_like(d)
    for c in range(0, channels):
        at = (row * channels + c) * places + p
        a = tl.load(a_ptr + at, mask=exists, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + at, mask=exists, other=0.0).to(tl.float32)
        along += tl.load(grad_ptr + at, mask=exists, other=0.0).to(tl.float32) * (a - b)
    share = tl.sigmoid(d)
    return d, rate * (2.0 * share * (1.0 - share) * along)


@jit
def _update_kernel(
    d_ptr, grad_ptr, a_ptr, b_ptr, out_ptr, channels, places, rate,
    LARGEST: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """LARGEST: every program looks through its whole row, so that one launch is enough."""
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * P + tl.arange(0, P)
    d, change = _change(d_ptr, grad_ptr, a_ptr, b_ptr, row, p, channels, places, rate)
    if LARGEST:
        tops = tl.zeros([P], tl.float32)
        for start in range(0, places, P):
            every = start + tl.arange(0, P)
            _, other = _change(d_ptr, grad_ptr, a_ptr, b_ptr, row, every, channels, places, rate)
            tops = tl.maximum(tops, tl.abs(other))
        top = tl.max(tops, 0)
        change = tl.abs(rate) * change / tl.where(top > 0, top, 1.0)
    at = out_ptr + row * places + p
    tl.store(at, (d - change).to(out_ptr.dtype.element_ty), mask=p < places)


def _launch(kernel: Any, places: int, rows: int, like: Tensor, *given: Any, **forms: bool) -> None:
    """Over so many places of each row, in the tile that ships for tensors like this one."""
    tile = needed(tile_for(MIXING, (), like), MIXING, like)
    with torch.cuda.device_of(like):
        kernel[cdiv(places, tile.block_n), rows](*given, P=tile.block_n, **forms, **tile.options)


@torch.library.custom_op("hookctl::local_blend", mutates_args=())
def local_blend(x: Tensor, sources: Tensor, mask: Tensor) -> Tensor:
    x, hard = x.contiguous(), mask.dtype == torch.bool
    mask = (mask.view(torch.uint8) if hard else mask).expand(x.shape[0], *x.shape[2:]).contiguous()
    out = torch.empty_like(x)
    rows, channels, places = x.flatten(2).shape
    given = x, sources.contiguous(), mask, out, channels, places
    _launch(_blend_kernel, places, rows, x, *given, HARD=hard)
    return out


@torch.library.custom_op("hookctl::merge_instances", mutates_args=())
def merge_instances(x: Tensor, masks: Tensor | None) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x[0])
    rows, channels, places = x.flatten(2).shape
    shares = x if masks is None else masks.float().contiguous()
    given = x, shares, out, rows, channels, places
    _launch(_merge_kernel, places, channels, x, *given, MASKED=masks is not None)
    return out


@torch.library.custom_op("hookctl::mix_predictions", mutates_args=())
def mix_predictions(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    rows, channels, places = a.flatten(2).shape
    d = d.expand(rows, *a.shape[2:]).contiguous()
    _launch(_mix_kernel, places, rows, a, a, b, d, out, channels, places)
    return out


@torch.library.custom_op("hookctl::update_difference", mutates_args=())
def update_difference(
    d: Tensor, grad: Tensor, a: Tensor, b: Tensor, rate: float, largest: bool = False
) -> Tensor:
    d, grad, a, b = (x.contiguous() for x in (d, grad, a, b))
    out = torch.empty_like(d)
    rows, channels, places = a.flatten(2).shape
    given = d, grad, a, b, out, channels, places, rate
    _launch(_update_kernel, places, rows, d, *given, LARGEST=largest)
    return out


@local_blend.register_fake
def _(x, sources, mask):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@merge_instances.register_fake
def _(x, masks):
    return torch.empty_like(x[0], memory_format=torch.contiguous_format)


@mix_predictions.register_fake
def _(a, b, d):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@update_difference.register_fake
def _(d, grad, a, b, rate, largest=False):
    return torch.empty_like(d, memory_format=torch.contiguous_format)


def specimens(arch: str) -> Iterator[Specimen]:
    forms: dict[str, tuple[Any, dict[str, Any]]] = {
        "local_blend": (
            _blend_kernel, {"sources_ptr": "*i64:16", "mask_ptr": "*u8:16", "HARD": True}
        ),
        "merge_instances": (_merge_kernel, {"masks_ptr": "*fp32:16", "MASKED": True}),
        "mix_predictions": (_mix_kernel, {"d_ptr": "*fp32:16"}),
        "update_difference": (
            _update_kernel,
            {"d_ptr": "*fp32:16", "out_ptr": "*fp32:16", "rate": "fp32", "LARGEST": True},
        ),
    }  # fmt: skip
    for element in ("fp16", "fp32"):
        tile = entry(MIXING, arch, (), element)
        if tile is None:
            continue
        for name, (kernel, types) in forms.items():
            arguments = form(kernel, element, P=tile.block_n, **types)
            yield Specimen(f"{name} {element}", kernel, arguments, tile, arch, dots=False)
