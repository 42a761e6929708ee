"""AdaIN of queries and keys."""

from __future__ import annotations

import torch

from hookctl.recipes.common.features.statistics import adain
from tests.hookctl.attention.calls import close, random


def test_the_formula() -> None:
    """(x - mean) / sqrt(var + 1e-5) * std_r + mean_r, element by element."""
    x, r = random(2, 3, 7, 4), random(2, 3, 9, 4, seed=1) * 3 + 2
    got = adain(x, r)
    for b, h, c in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 4))).tolist():
        mine, theirs = x[b, h, :, c], r[b, h, :, c]
        std = [((y - y.mean()).square().sum() / (len(y) - 1) + 1e-5).sqrt() for y in (mine, theirs)]
        want = (mine - mine.mean()) / std[0] * std[1] + theirs.mean()
        close(got[b, h, :, c], want, 1e-12)  # float64


def test_statistics_become_those_of_the_reference() -> None:
    x, r = random(2, 1, 3, 64, 4) * 5 - 1, random(1, 3, 64, 4, seed=1)
    got = adain(x, r)
    close(got.mean(-2), r.mean(-2).expand(2, 1, 3, 4), 1e-4)
    close(got.std(-2), r.std(-2).expand(2, 1, 3, 4), 1e-4)


def test_one_token() -> None:
    x, r = random(2, 1, 4), random(2, 1, 4, seed=1)
    close(adain(x, r), r, 1e-12)
