"""The low-frequency gain against the Fourier transform that it replaces, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hookctl.kernels.fourier_gain import forward, fourier_gain, reference
from tests.kernels.closeness import TOLERANCE, close, random

DTYPES = list(TOLERANCE)
by_kernel, in_torch = forward.fourier_gain, reference.fourier_gain


def by_transform(x: Tensor, gain: Tensor) -> Tensor:
    """The published filter: the shifted spectrum, scaled inside a window of 2 x 2."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x, dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones_like(spectrum)
    row, column = x.shape[-2] // 2, x.shape[-1] // 2
    window = (..., slice(row - 1, row + 1), slice(column - 1, column + 1))
    mask[window] = gain[:, None, None].to(mask)
    shifted = torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))
    return torch.fft.ifftn(shifted, dim=(-2, -1)).real


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 3, 2, 5), (1, 2, 2, 2), (1, 1, 17, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    gain = random(shape[1], seed=2)
    exact = [t.double().requires_grad_() for t in (x, gain)]
    want = by_transform(*exact)
    wants = torch.autograd.grad(want, exact, grad.double())
    for form in (by_kernel, in_torch):
        given = [x.clone().requires_grad_(), gain.clone().requires_grad_()]
        out = form(*given)
        assert out.dtype == dtype
        close("out", out, want, TOLERANCE[dtype])
        dx, dgain = torch.autograd.grad(out, given, grad)
        close("dx", dx, wants[0], TOLERANCE[dtype])
        close("dgain", dgain, wants[1], TOLERANCE[dtype])


def test_strided_maps_and_bits() -> None:
    joined = random(2, 8, 6, 10).to(memory_format=torch.channels_last)
    for x in (joined[:, 3:], joined[..., ::2], joined.transpose(2, 3)):
        close(
            "out",
            by_kernel(x, 0.3),
            in_torch(x.double(), 0.3),
            TOLERANCE[x.dtype],
        )
        assert torch.equal(by_kernel(x, 0.3), by_kernel(x, 0.3))


def test_a_gain_of_one_is_the_identity() -> None:
    x = random(1, 3, 8, 8)
    assert torch.equal(by_kernel(x, 1.0), x) and torch.equal(in_torch(x, 1.0), x)


def test_compiled_without_graph_breaks() -> None:
    x = random(1, 3, 4, 6).requires_grad_()
    compiled = torch.compile(lambda x: by_kernel(x * 2, 0.5), fullgraph=True, backend="aot_eager")
    out = compiled(x)
    close("out", out, in_torch(x.double() * 2, 0.5), TOLERANCE[x.dtype])
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    close("dx", dx, 2 * in_torch(torch.ones_like(x).double(), 0.5), TOLERANCE[x.dtype])


@pytest.mark.parametrize("shape", [(2, 3, 1, 6), (1, 2, 5, 1), (1, 2, 1, 2), (2, 2, 1, 1)])
def test_lines_and_single_cells(shape: tuple[int, ...]) -> None:
    x, gain = random(*shape).double(), random(shape[1]).double()
    close("out", fourier_gain(x, gain), by_transform(x, gain), 1e-10)


def test_what_is_no_feature_map_is_refused() -> None:
    for x in (random(2, 3, 4), random(1, 2, 0, 5)):
        with pytest.raises(ValueError, match="give .rows, channels, height, width."):
            fourier_gain(x, 0.5)
