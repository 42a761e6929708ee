"""The low-frequency gain by its kernel, on a GPU or in the interpreter."""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, jit, tl
from hookctl.kernels.common.launch import Specimen, cdiv
from hookctl.kernels.common.launch_tables import GAIN, entry, needed, tile_for
from hookctl.kernels.fourier_gain import backward
from hookctl.kernels.fourier_gain.waves import amounts, subtract_waves


@jit
def _forward_kernel(
    x_ptr, gain_ptr, out_ptr, channels, height, width,
    stride_b, stride_c, stride_h, stride_w, gain_stride_b, gain_stride_c,
    out_stride_b, out_stride_c, out_stride_h, out_stride_w, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    x_ptr += i_b * stride_b
    m0, m1, m2, m3, m4, m5, m6 = amounts(
        x_ptr, o_c, stride_c, stride_h, stride_w, channels, height, width, C, P
    )
    gain = tl.load(gain_ptr + i_b * gain_stride_b + o_c * gain_stride_c, mask=o_c < channels)
    share = (1.0 - gain) / (height * width)
    subtract_waves(
        x_ptr, out_ptr + i_b * out_stride_b, o_c, share, stride_c, stride_h, stride_w,
        out_stride_c, out_stride_h, out_stride_w, channels, height, width,
        m0, m1, m2, m3, m4, m5, m6, P,
    )  # fmt: skip


@torch.library.custom_op("hookctl::fourier_gain", mutates_args=())
def operator(x: Tensor, gain: Tensor) -> Tensor:
    out = torch.empty_like(x)
    rows, channels, height, width = x.shape
    tile = needed(tile_for(GAIN, (), x), GAIN, x)
    with torch.cuda.device_of(x):
        _forward_kernel[cdiv(channels, tile.block_m), rows](
            x, gain, out, channels, height, width,
            *x.stride(), *gain.stride(), *out.stride(),
            C=tile.block_m, P=tile.block_n, **tile.options,
        )  # fmt: skip
    return out


@operator.register_fake
def _(x, gain):
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return backward.operator(grad, *ctx.saved_tensors)


operator.register_autograd(_backward, setup_context=_save)


def fourier_gain(x: Tensor, gain: Tensor | float) -> Tensor:
    """F of a feature map; see `hookctl.kernels.fourier_gain`."""
    if not isinstance(gain, Tensor):
        gain = torch.full((), gain, dtype=torch.float32, device=x.device)
    return operator(x, gain.to(x.device, torch.float32).expand(x.shape[:2]))


def specimens(arch: str) -> Iterator[Specimen]:
    for element in ("fp16", "fp32"):
        tile = entry(GAIN, arch, (), element)
        if tile is not None:
            types = {"C": tile.block_m, "P": tile.block_n, "gain_ptr": "*fp32:16"}
            arguments = form(_forward_kernel, element, **types)
            name = f"fourier_gain forward {element}"
            yield Specimen(name, _forward_kernel, arguments, tile, arch, dots=False)
