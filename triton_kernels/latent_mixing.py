"""What methods do to latents between two denoiser calls, each in one launch.

    local_blend        x <- x_source + M (x - x_source)         (Hertz et al., arXiv 2208.01626)
    merge_instances    mean of the latents of all instances, or each pasted into its place
                       (Wang et al., arXiv 2402.03290, multi-instance sampler)
    mix_predictions    sigma(d) eps_a + (1 - sigma(d)) eps_b    (Zhang et al., arXiv 2402.12908)
    update_difference  d - rate 2 sigma'(d) <G, a - b>, the step of the same method, or a step whose
                       largest change is the rate

RealCompo's two influence maps go through a softmax and get opposite gradients, so one map d, their
difference, is enough. Latents are [rows, channels, *places]; a mask or d has one value a place.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, fused, jit, tl
from hookctl.kernels.common.launch import Specimen
from hookctl.kernels.common.launch_tables import MIXING, entry, needed, tile_for
from hookctl.kernels.operators import custom_op

# -- references ------------------------------------------------------------------------------------


def blend_reference(x: Tensor, sources: Tensor, mask: Tensor) -> Tensor:
    """`local_blend` in plain torch."""
    source, share = x.index_select(0, sources), mask[:, None]
    if mask.dtype == torch.bool:
        return torch.where(share, x, source)
    wide = torch.promote_types(x.dtype, mask.dtype)  # a lerp of halves is rounded once, at its end
    return torch.lerp(source.to(wide), x.to(wide), share.to(wide)).to(x.dtype)


def merge_reference(x: Tensor, masks: Tensor | None) -> Tensor:
    """`merge_instances` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if masks is None:
        return x.mean(0, dtype=wide).to(x.dtype)
    out = x[0].to(wide)
    for one, mask in zip(x[1:], masks, strict=True):
        out = torch.lerp(out, one.to(wide), mask.to(wide))
    return out.to(x.dtype)


def mix_reference(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """`mix_predictions` in plain torch."""
    wide = torch.promote_types(a.dtype, torch.float32)
    share = d.to(wide).sigmoid()[:, None]
    return torch.lerp(b.to(wide), a.to(wide), share).to(a.dtype)


def update_reference(
    d: Tensor, grad: Tensor, a: Tensor, b: Tensor, rate: float, largest: bool = False
) -> Tensor:
    """`update_difference` in plain torch."""
    wide = torch.promote_types(d.dtype, torch.float32)
    share = d.to(wide).sigmoid()
    along = (grad.to(wide) * (a.to(wide) - b.to(wide))).sum(1)
    change = rate * (2 * share * (1 - share) * along)
    if largest:
        top = change.abs().flatten(1).amax(1).reshape(-1, *[1] * (change.dim() - 1))
        change = abs(rate) * change / top.masked_fill(top == 0, 1)
    return (d.to(wide) - change).to(d.dtype)


# -- kernels: contiguous [rows, channels, places]; a program has some places of one row ------------


@jit
def _between(a, b, share):
    """a where the share is 0 and b where it is 1, both to the bit."""
    return tl.where(share < 0.5, a + share * (b - a), b - (1.0 - share) * (b - a))


@jit
def _blend_kernel(x_ptr, sources_ptr, mask_ptr, out_ptr, channels, places,
                  HARD: tl.constexpr, P: tl.constexpr):  # fmt: skip
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
def _merge_kernel(x_ptr, masks_ptr, out_ptr, rows, channels, places,
                  MASKED: tl.constexpr, P: tl.constexpr):  # fmt: skip
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
def _update_kernel(d_ptr, grad_ptr, a_ptr, b_ptr, out_ptr, channels, places, rate,
                   LARGEST: tl.constexpr, P: tl.constexpr):  # fmt: skip
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


# -- operators -------------------------------------------------------------------------------------


def _launch(kernel: Any, places: int, rows: int, like: Tensor, *given: Any, **forms: bool) -> None:
    """Over so many places of each row, in the tile that ships for tensors like this one."""
    tile = needed(tile_for(MIXING, (), like), MIXING, like)
    with torch.cuda.device_of(like):
        kernel[-(-places // tile.block_n), rows](*given, P=tile.block_n, **forms, **tile.options)


@custom_op("local_blend")
def blend_kernel(x: Tensor, sources: Tensor, mask: Tensor) -> Tensor:
    """`local_blend` by the kernel, on a GPU or in the interpreter."""
    x, hard = x.contiguous(), mask.dtype == torch.bool
    mask = (mask.view(torch.uint8) if hard else mask).expand(x.shape[0], *x.shape[2:]).contiguous()
    out = torch.empty_like(x)
    rows, channels, places = x.flatten(2).shape
    given = x, sources.contiguous(), mask, out, channels, places
    _launch(_blend_kernel, places, rows, x, *given, HARD=hard)
    return out


@custom_op("merge_instances")
def merge_kernel(x: Tensor, masks: Tensor | None) -> Tensor:
    """`merge_instances` by the kernel, on a GPU or in the interpreter."""
    x = x.contiguous()
    out = torch.empty_like(x[0])
    rows, channels, places = x.flatten(2).shape
    shares = x if masks is None else masks.float().contiguous()
    given = x, shares, out, rows, channels, places
    _launch(_merge_kernel, places, channels, x, *given, MASKED=masks is not None)
    return out


@custom_op("mix_predictions")
def mix_kernel(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """`mix_predictions` by the kernel, on a GPU or in the interpreter."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    rows, channels, places = a.flatten(2).shape
    d = d.expand(rows, *a.shape[2:]).contiguous()
    _launch(_mix_kernel, places, rows, a, a, b, d, out, channels, places)
    return out


@custom_op("update_difference")
def update_kernel(
    d: Tensor, grad: Tensor, a: Tensor, b: Tensor, rate: float, largest: bool = False
) -> Tensor:
    """`update_difference` by the kernel, on a GPU or in the interpreter."""
    d, grad, a, b = (x.contiguous() for x in (d, grad, a, b))
    out = torch.empty_like(d)
    rows, channels, places = a.flatten(2).shape
    given = d, grad, a, b, out, channels, places, rate
    _launch(_update_kernel, places, rows, d, *given, LARGEST=largest)
    return out


@blend_kernel.register_fake
def _(x, sources, mask):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@merge_kernel.register_fake
def _(x, masks):
    return torch.empty_like(x[0], memory_format=torch.contiguous_format)


@mix_kernel.register_fake
def _(a, b, d):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@update_kernel.register_fake
def _(d, grad, a, b, rate, largest=False):
    return torch.empty_like(d, memory_format=torch.contiguous_format)


# -- functions: a kernel on a GPU, the reference elsewhere and where a gradient is wanted ----------


def _plain(*tensors: Tensor | None) -> bool:
    given = [x for x in tensors if x is not None]
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return learned or not fused(*given)


def local_blend(x: Tensor, sources: Tensor, mask: Tensor) -> Tensor:
    """Each row of x inside its mask, and the row that it comes from outside.

    x: [rows, channels, *places]; sources: int64 [rows], on its device; mask: [rows | 1, *places],
    bool, or shares from 0 to 1.
    """
    return (blend_reference if _plain(x, mask) else blend_kernel)(x, sources, mask)


def merge_instances(x: Tensor, masks: Tensor | None = None) -> Tensor:
    """One latent from that of the whole picture and those of its instances.

    x: [1 + instances, channels, *places], the whole picture first; masks: [instances, *places], 0
    to 1: each instance is pasted into its own, in order; None: the mean of all.
    """
    return (merge_reference if _plain(x, masks) else merge_kernel)(x, masks)


def mix_predictions(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """sigma(d) a + (1 - sigma(d)) b, the softmax of two maps whose difference is d.

    a, b: [rows, channels, *places]; d: [rows | 1, *places].
    """
    return (mix_reference if _plain(a, b, d) else mix_kernel)(a, b, d)


def update_difference(
    d: Tensor, grad: Tensor, a: Tensor, b: Tensor, rate: float, *, largest: bool = False
) -> Tensor:
    """d after one gradient step of both maps whose difference it is.

    d: [rows, *places]; grad: of the loss with respect to the trial latent sigma(d) a + (1 - sigma)
    b, [rows, channels, *places] like a and b; rate: length of the step, or with `largest` the size
    of the largest change of each row.
    """
    chosen = update_reference if _plain(d, grad, a, b) else update_kernel
    return chosen(d, grad, a, b, rate, largest)


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
