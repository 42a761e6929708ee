"""Gaussian blur over a grid of tokens, as one small matrix for each axis.

A blur by matrices is exact at any width, where a convolution kernel would have to be as long as
the grid or be cut off: as sigma grows it tends to the mean.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def blur_matrix(size: int, sigma: float) -> Tensor:
    """Rows of weights [size, size] of a Gaussian of `sigma` cells, mirrored at the edges.

    Float64; sigma 0 is the identity, infinity the mean.
    """
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    if sigma > 8 * size:  # the mean, to far below rounding
        return torch.full((size, size), 1 / size, dtype=torch.float64)
    cells = torch.arange(size, dtype=torch.float64)
    reach = math.ceil(10 * sigma / (2 * size)) + 1
    total = torch.zeros(size, size, dtype=torch.float64)
    for shift in range(-reach, reach + 1):
        for repeated in (cells, 2 * size - 1 - cells):  # the grid and its mirror image
            distance = cells[:, None] - repeated[None] - 2 * size * shift
            total += torch.exp(-0.5 * (distance / sigma) ** 2)
    return total / total.sum(1, keepdim=True)


@functools.lru_cache(maxsize=64)
def cut_blur_matrix(size: int, sigma: float, length: int) -> Tensor:
    """The same with a kernel of `length` cells (odd), mirrored about the edge cells.

    What a convolution with reflecting padding does (`torch.nn.functional.pad(mode="reflect")`);
    half of the kernel must fit on the grid.
    """
    offsets = torch.arange(length) - length // 2
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2) if sigma else (offsets == 0).double()
    cells = (torch.arange(size)[:, None] + offsets).abs()
    cells = torch.where(cells < size, cells, 2 * (size - 1) - cells)
    weights = (kernel / kernel.sum()).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, cells, weights)


def blur(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images [..., height, width] through a matrix for each axis."""
    return rows.to(x) @ x @ columns.to(x).mT
