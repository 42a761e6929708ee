"""FreeU against its official form by Fourier transform, and against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl.errors import InputError
from hookctl.recipes.freeu import FreeU, scale_low_frequencies
from tests import zoo


def fourier_filter(x: Tensor, s: float) -> Tensor:
    """The published filter: the shifted spectrum, scaled inside a window of 2 x 2."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.double(), dim=(-2, -1)), dim=(-2, -1))
    height, width = x.shape[-2:]
    mask = torch.ones_like(spectrum)
    row, column = height // 2, width // 2
    mask[..., row - 1 : row + 1, column - 1 : column + 1] = s
    shifted = torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))
    return torch.fft.ifftn(shifted, dim=(-2, -1)).real


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (16, 5), (3, 12), (2, 2), (2, 5)])
@pytest.mark.parametrize("s", [0.0, 0.2, 0.9, 1.5])
def test_filter_equals_the_fourier_form(size: tuple[int, int], s: float) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    error = (scale_low_frequencies(x, s) - fourier_filter(x, s)).abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("s", [0.4, torch.tensor([[0.4]])])
def test_a_single_cell_is_its_own_mean(s: float | torch.Tensor) -> None:
    x = torch.randn(2, 3, 1, 1)
    assert torch.allclose(scale_low_frequencies(x, s), 0.4 * x)


def test_gains_of_one_are_bit_identical() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    plain = case.run(pipe, ["a red cat"])
    with hookctl.control(pipe, FreeU(1, 1, 1, 1)):
        assert torch.equal(case.run(pipe, ["a red cat"]), plain)
    with hookctl.control(pipe, FreeU()):
        assert not torch.equal(case.run(pipe, ["a red cat"]), plain)
    assert torch.equal(case.run(pipe, ["a red cat"]), plain)


def test_the_diffusers_rule_equals_enable_freeu() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    with hookctl.control(pipe, FreeU(1.3, 1.4, 0.9, 0.2, rule="diffusers")):
        ours = case.run(pipe, ["a red cat"])
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    theirs = case.run(pipe, ["a red cat"])
    pipe.disable_freeu()
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_constant_map_keeps_its_values() -> None:
    edit = FreeU()
    assert torch.isfinite(edit._strengthen(torch.ones(1, 4, 3, 3), 1.4)).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"b1": -1}, "b1=-1"), ({"rule": "x"}, "official"), ({"version": 3}, "version=3")],
)
def test_bad_arguments(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        FreeU(**arguments)  # type: ignore[arg-type]


def test_a_model_without_skips_is_refused() -> None:
    pipe = zoo.PIPELINES["flux"].make()
    with pytest.raises(hookctl.errors.UnsupportedError, match="skip connections"):
        hookctl.control(pipe, FreeU()).__enter__()
