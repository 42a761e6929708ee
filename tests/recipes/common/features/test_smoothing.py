"""Blurs by matrices: what they keep, and what a convolution makes of the same kernel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hookctl.recipes.common.features.smoothing import blur, blur_matrix, cut_blur_matrix
from tests.families.subjects import error


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_blur_matrices(size: int) -> None:
    for sigma in (0.0, 0.3, 2.0, 50.0, math.inf):
        weights = blur_matrix(size, sigma)
        assert torch.allclose(weights.sum(0), torch.ones(size).double())  # keeps the mean
        assert torch.allclose(weights.sum(1), torch.ones(size).double())
    assert torch.equal(blur_matrix(size, 0.0), torch.eye(size).double())
    assert error(blur_matrix(size, 8.0 * size), blur_matrix(size, math.inf)) < 1e-12
    x = torch.randn(3, 5, 9, 8, dtype=torch.float64)
    ours = blur(x, cut_blur_matrix(9, 1.3, 9), cut_blur_matrix(8, 1.3, 9))
    kernel = torch.exp(-0.5 * (torch.arange(-4.0, 5).double() / 1.3) ** 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(5, 1, -1, -1)
    want = F.conv2d(F.pad(x, [4] * 4, mode="reflect"), kernel, groups=5)
    assert error(ours, want) < 1e-12
