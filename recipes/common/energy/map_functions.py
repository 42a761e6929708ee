"""Functions of attention maps that energies are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.sites import Site


def mean_map(maps: Mapping[Site, Tensor]) -> Tensor:
    """The mean over heads and sites, on the finest grid: [frames, height, width, tokens].

    maps: of each site [frames, heads, height, width, tokens].
    """
    means = [map_.mean(1) for map_ in maps.values()]
    height, width = max((mean.shape[1:3] for mean in means), key=lambda size: size[0] * size[1])
    return torch.stack([_resized(mean, height, width) for mean in means]).mean(0)


def _resized(mean: Tensor, height: int, width: int) -> Tensor:
    if mean.shape[1:3] == (height, width):
        return mean
    resized = F.interpolate(mean.movedim(-1, 1), size=(height, width), mode="bilinear")
    return resized.movedim(1, -1)


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Maps [..., height, width] under a Gaussian of 3 x 3 cells, sigma in cells."""
    edge = math.exp(-0.5 / sigma**2)
    kernel = maps.new_tensor([edge, 1.0, edge]) / (1 + 2 * edge)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    padded = F.pad(flat, (1, 1, 1, 1), mode=mode)
    return F.conv2d(padded, torch.outer(kernel, kernel)[None, None]).reshape(maps.shape)


def top_mean(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """The mean of the largest values, as many as `share` of the mask's cells and at least one."""
    count = max(int(share * float(mask.sum())), 1)
    return values.flatten().topk(count).values.mean()


def inside_share(map_: Tensor, mask: Tensor) -> Tensor:
    """The share of a map [..., cells] that lies in a mask [cells]; 0 for a map of zeros."""
    total = map_.sum(-1).clamp_min(torch.finfo(map_.dtype).tiny)
    return (map_ * mask).sum(-1) / total
