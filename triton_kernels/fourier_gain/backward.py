"""The gradient of the low-frequency gain, to the map and to the gain."""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hookctl.kernels.common.guard import form, jit, tl
from hookctl.kernels.common.launch import Specimen, cdiv
from hookctl.kernels.common.launch_tables import GAIN, entry, needed, tile_for
from hookctl.kernels.fourier_gain.waves import amounts, subtract_waves


@jit
def _backward_kernel(
    grad_ptr, x_ptr, gain_ptr, dx_ptr, dgain_ptr, channels, height, width,
    grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    stride_b, stride_c, stride_h, stride_w, gain_stride_b, gain_stride_c,
    dx_stride_b, dx_stride_c, dx_stride_h, dx_stride_w,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dx = F(grad); dgain = sum_i <x, w_i> <grad, w_i> / (H W), [rows, channels]."""
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * C + tl.arange(0, C)
    grad_ptr += i_b * grad_stride_b
    g0, g1, g2, g3, g4, g5, g6 = amounts(
        grad_ptr, o_c, grad_stride_c, grad_stride_h, grad_stride_w, channels, height, width, C, P
    )
    m0, m1, m2, m3, m4, m5, m6 = amounts(
        x_ptr + i_b * stride_b, o_c, stride_c, stride_h, stride_w, channels, height, width, C, P
    )
    product = g0 * m0 + g1 * m1 + g2 * m2 + g3 * m3 + g4 * m4 + g5 * m5 + g6 * m6
    exists = o_c < channels
    tl.store(dgain_ptr + i_b * channels + o_c, product / (height * width), mask=exists)
    gain = tl.load(gain_ptr + i_b * gain_stride_b + o_c * gain_stride_c, mask=exists)
    subtract_waves(
        grad_ptr, dx_ptr + i_b * dx_stride_b, o_c, (1.0 - gain) / (height * width),
        grad_stride_c, grad_stride_h, grad_stride_w, dx_stride_c, dx_stride_h, dx_stride_w,
        channels, height, width, g0, g1, g2, g3, g4, g5, g6, P,
    )  # fmt: skip


@torch.library.custom_op("hookctl::fourier_gain_backward", mutates_args=())
def operator(grad: Tensor, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    dx, dgain = torch.empty_like(x), torch.empty(x.shape[:2], device=x.device)
    rows, channels, height, width = x.shape
    tile = needed(tile_for(GAIN, (), x), GAIN, x)
    with torch.cuda.device_of(x):
        _backward_kernel[cdiv(channels, tile.block_m), rows](
            grad, x, gain, dx, dgain, channels, height, width,
            *grad.stride(), *x.stride(), *gain.stride(), *dx.stride(),
            C=tile.block_m, P=tile.block_n, **tile.options,
        )  # fmt: skip
    return dx, dgain


@operator.register_fake
def _(grad, x, gain):
    return torch.empty_like(x), torch.empty(x.shape[:2], device=x.device)


def specimens(arch: str) -> Iterator[Specimen]:
    for element in ("fp16", "fp32"):
        tile = entry(GAIN, arch, (), element)
        if tile is not None:
            types = {
                "C": tile.block_m,
                "P": tile.block_n,
                "gain_ptr": "*fp32:16",
                "dgain_ptr": "*fp32:16",
            }
            arguments = form(_backward_kernel, element, **types)
            name = f"fourier_gain backward {element}"
            yield Specimen(name, _backward_kernel, arguments, tile, arch, dots=False)
