"""Scale the lowest frequencies of a feature map, without a Fourier transform (FreeU, ScaleU).

The published filter scales the window {-1, 0}^2 of the shifted spectrum by a gain and takes the
real part (Si et al., arXiv 2309.11497; Wang et al., arXiv 2402.03290). That is a projection on the
mean and on the cosines and sines of the waves (1,0), (0,1), (1,1), all with the same factor:

    F(x) = x - (1 - gain) / (H W) * sum_i w_i <x, w_i>        i = 1 .. 7

since a wave has squared norm H W / 2 and half of its two frequencies lies in the window, or H W and
all of it where the two are one. Seven inner products per channel, any size and dtype. F is its own
transpose, so its gradient is F of the gradient.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, fused, jit, tl
from hookctl.kernels.common.launch import Launch, Specimen
from hookctl.kernels.common.launch_tables import GAIN, entry, needed, tile_for
from hookctl.kernels.operators import custom_op


def fourier_gain(x: Tensor, gain: Tensor | float) -> Tensor:
    """F of a feature map [rows, channels, height, width]; a gain of 1 is the identity.

    gain: a number, or a tensor that broadcasts to [rows, channels]; differentiable in both. A side
    of 1 has no waves of its own, and a single cell is its own mean.
    Raises ValueError for anything but a feature map.
    """
    if x.dim() != 4 or 0 in x.shape[-2:]:
        raise ValueError(
            f"fourier_gain: x is {tuple(x.shape)}; give [rows, channels, height, width]"
        )
    return by_kernel(x, gain) if fused(x) and 1 not in x.shape[-2:] else reference(x, gain)


def reference(x: Tensor, gain: Tensor | float) -> Tensor:
    """The same in plain torch."""
    height, width = x.shape[-2:]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    flat = wide.flatten(2)
    waves = _waves(height, width, wide.dtype, x.device)
    share: Tensor | float
    if isinstance(gain, Tensor):
        share = (1 - gain.to(wide).expand(x.shape[:2])[..., None]) / (height * width)
    else:
        share = (1 - gain) / (height * width)
    amounts = (flat @ waves.mT) * share
    return (flat - amounts @ waves).unflatten(2, (height, width)).to(x.dtype)


def _waves(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mean and the cosine and sine of the three lowest waves, [7, pixels]; of the one there is,
    [3, pixels], in a line, and the mean alone for a single cell."""
    rows = torch.arange(height, dtype=dtype, device=device)[:, None] * (2 * math.pi / height)
    columns = torch.arange(width, dtype=dtype, device=device)[None] * (2 * math.pi / width)
    found = [torch.ones(height, width, dtype=dtype, device=device)]
    angles = [rows] * (height > 1) + [columns] * (width > 1)
    if len(angles) == 2:
        angles.append(rows + columns)
    for angle in angles:
        found += [angle.cos().expand(height, width), angle.sin().expand(height, width)]
    return torch.stack(found).flatten(1)


# -- kernels ---------------------------------------------------------------------------------------


@jit
def _tile(ptr, o_c, o_p, stride_c, stride_h, stride_w, channels, height, width):
    """A tile of a feature map in float32, its offsets and what of it exists."""
    o_x = o_c.to(tl.int64)[:, None] * stride_c
    o_x += (o_p // width * stride_h + o_p % width * stride_w)[None, :]
    mask = (o_c < channels)[:, None] & (o_p < height * width)[None, :]
    return tl.load(ptr + o_x, mask=mask, other=0.0).to(tl.float32), o_x, mask


@jit
def _angles(o_p, height, width):
    """cos and sin of the waves (1,0) and (0,1)."""
    a = 6.283185307179586 * (o_p // width).to(tl.float32) / height
    b = 6.283185307179586 * (o_p % width).to(tl.float32) / width
    return tl.cos(a), tl.sin(a), tl.cos(b), tl.sin(b)


@jit
def _amounts(ptr, o_c, stride_c, stride_h, stride_w, channels, height, width,
             C: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """The seven inner products of each channel, [C] each."""
    m0 = tl.zeros([C], tl.float32)
    m1 = tl.zeros([C], tl.float32)
    m2 = tl.zeros([C], tl.float32)
    m3 = tl.zeros([C], tl.float32)
    m4 = tl.zeros([C], tl.float32)
    m5 = tl.zeros([C], tl.float32)
    m6 = tl.zeros([C], tl.float32)
    for start in range(0, height * width, P):
        o_p = start + tl.arange(0, P)
        x, _, _ = _tile(ptr, o_c, o_p, stride_c, stride_h, stride_w, channels, height, width)
        ca, sa, cb, sb = _angles(o_p, height, width)
        m0 += tl.sum(x, 1)
        m1 += tl.sum(x * ca[None, :], 1)
        m2 += tl.sum(x * sa[None, :], 1)
        m3 += tl.sum(x * cb[None, :], 1)
        m4 += tl.sum(x * sb[None, :], 1)
        m5 += tl.sum(x * (ca * cb - sa * sb)[None, :], 1)
        m6 += tl.sum(x * (sa * cb + ca * sb)[None, :], 1)
    return m0, m1, m2, m3, m4, m5, m6


@jit
def _filter(ptr, out_ptr, o_c, share, stride_c, stride_h, stride_w, out_stride_c, out_stride_h,
            out_stride_w, channels, height, width, m0, m1, m2, m3, m4, m5, m6,
            P: tl.constexpr):  # fmt: skip
    """out = x - share * (the waves in their amounts)."""
    for start in range(0, height * width, P):
        o_p = start + tl.arange(0, P)
        x, _, mask = _tile(ptr, o_c, o_p, stride_c, stride_h, stride_w, channels, height, width)
        ca, sa, cb, sb = _angles(o_p, height, width)
        low = m0[:, None] + m1[:, None] * ca[None, :] + m2[:, None] * sa[None, :]
        low += m3[:, None] * cb[None, :] + m4[:, None] * sb[None, :]
        low += m5[:, None] * (ca * cb - sa * sb)[None, :]
        low += m6[:, None] * (sa * cb + ca * sb)[None, :]
        o_out = o_c.to(tl.int64)[:, None] * out_stride_c
        o_out += (o_p // width * out_stride_h + o_p % width * out_stride_w)[None, :]
        y = x - share[:, None] * low
        tl.store(out_ptr + o_out, y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _forward_kernel(x_ptr, gain_ptr, out_ptr, channels, height, width,
                    stride_b, stride_c, stride_h, stride_w, gain_stride_b, gain_stride_c,
                    out_stride_b, out_stride_c, out_stride_h, out_stride_w,
                    C: tl.constexpr, P: tl.constexpr):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    x_ptr += i_b * stride_b
    m0, m1, m2, m3, m4, m5, m6 = _amounts(
        x_ptr, o_c, stride_c, stride_h, stride_w, channels, height, width, C, P
    )
    gain = tl.load(gain_ptr + i_b * gain_stride_b + o_c * gain_stride_c, mask=o_c < channels)
    share = (1.0 - gain) / (height * width)
    _filter(
        x_ptr, out_ptr + i_b * out_stride_b, o_c, share, stride_c, stride_h, stride_w,
        out_stride_c, out_stride_h, out_stride_w, channels, height, width,
        m0, m1, m2, m3, m4, m5, m6, P,
    )  # fmt: skip


@jit
def _backward_kernel(grad_ptr, x_ptr, gain_ptr, dx_ptr, dgain_ptr, channels, height, width,
                     grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
                     stride_b, stride_c, stride_h, stride_w, gain_stride_b, gain_stride_c,
                     dx_stride_b, dx_stride_c, dx_stride_h, dx_stride_w,
                     C: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """dx = F(grad); dgain = sum_i <x, w_i> <grad, w_i> / (H W), [rows, channels]."""
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    grad_ptr += i_b * grad_stride_b
    g0, g1, g2, g3, g4, g5, g6 = _amounts(
        grad_ptr, o_c, grad_stride_c, grad_stride_h, grad_stride_w, channels, height, width, C, P
    )
    m0, m1, m2, m3, m4, m5, m6 = _amounts(
        x_ptr + i_b * stride_b, o_c, stride_c, stride_h, stride_w, channels, height, width, C, P
    )
    product = g0 * m0 + g1 * m1 + g2 * m2 + g3 * m3 + g4 * m4 + g5 * m5 + g6 * m6
    exists = o_c < channels
    tl.store(dgain_ptr + i_b * channels + o_c, product / (height * width), mask=exists)
    gain = tl.load(gain_ptr + i_b * gain_stride_b + o_c * gain_stride_c, mask=exists)
    _filter(
        grad_ptr, dx_ptr + i_b * dx_stride_b, o_c, (1.0 - gain) / (height * width),
        grad_stride_c, grad_stride_h, grad_stride_w, dx_stride_c, dx_stride_h, dx_stride_w,
        channels, height, width, g0, g1, g2, g3, g4, g5, g6, P,
    )  # fmt: skip


# -- operators -------------------------------------------------------------------------------------


@custom_op("fourier_gain")
def _forward_op(x: Tensor, gain: Tensor) -> Tensor:
    out = torch.empty_like(x)
    rows, channels, height, width = x.shape
    tile = _launch(x)
    with torch.cuda.device_of(x):
        _forward_kernel[-(-channels // tile.block_m), rows](
            x, gain, out, channels, height, width,
            *x.stride(), *gain.stride(), *out.stride(),
            C=tile.block_m, P=tile.block_n, **tile.options,
        )  # fmt: skip
    return out


@_forward_op.register_fake
def _(x, gain):
    return torch.empty_like(x)


@custom_op("fourier_gain_backward")
def _backward_op(grad: Tensor, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    dx, dgain = torch.empty_like(x), torch.empty(x.shape[:2], device=x.device)
    rows, channels, height, width = x.shape
    tile = _launch(x)
    with torch.cuda.device_of(x):
        _backward_kernel[-(-channels // tile.block_m), rows](
            grad, x, gain, dx, dgain, channels, height, width,
            *grad.stride(), *x.stride(), *gain.stride(), *dx.stride(),
            C=tile.block_m, P=tile.block_n, **tile.options,
        )  # fmt: skip
    return dx, dgain


@_backward_op.register_fake
def _(grad, x, gain):
    return torch.empty_like(x), torch.empty(x.shape[:2], device=x.device)


def _launch(x: Tensor) -> Launch:
    return needed(tile_for(GAIN, (), x), GAIN, x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.hookctl.fourier_gain_backward(grad, *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_save)


def by_kernel(x: Tensor, gain: Tensor | float) -> Tensor:
    """`fourier_gain` by the kernel, on a GPU or in the interpreter."""
    if not isinstance(gain, Tensor):
        gain = torch.full((), gain, dtype=torch.float32, device=x.device)
    return _forward_op(x, gain.to(x.device, torch.float32).expand(x.shape[:2]))


def specimens(arch: str) -> Iterator[Specimen]:
    for element in ("fp16", "fp32"):
        launch = entry(GAIN, arch, (), element)
        if launch is None:
            continue
        tile = {"C": launch.block_m, "P": launch.block_n, "gain_ptr": "*fp32:16"}
        for kernel, name in ((_forward_kernel, "forward"), (_backward_kernel, "backward")):
            more = {"dgain_ptr": "*fp32:16"} if name == "backward" else {}
            arguments = form(kernel, element, **tile, **more)
            full = f"fourier_gain {name} {element}"
            yield Specimen(full, kernel, arguments, launch, arch, dots=False)
