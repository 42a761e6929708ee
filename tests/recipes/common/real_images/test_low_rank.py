"""Low-rank changes: what they add to linear and convolutional layers, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hookctl.errors import InputError
from hookctl.recipes.common.real_images.low_rank import LowRank


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5),
    ).double()


def change_of(inner: nn.Module, pattern: str = ".") -> LowRank:
    """With second factors that change something, as after a fit."""
    generator = torch.Generator().manual_seed(1)
    change = LowRank(inner, pattern, 2, generator)
    for _, b in change.factors.values():
        b.copy_(torch.randn(b.shape, generator=generator))
    return change


def test_it_is_the_weights_plus_a_product() -> None:
    inner, x = model(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    change = change_of(inner)
    assert set(change.factors) == {"0", "3"}  # a grouped convolution has no product of two
    with change.applied(0.5):
        got = inner(x)
    for path, (a, b) in change.factors.items():
        weight = inner[int(path)].weight
        weight.data += 0.5 * (b.double().flatten(1) @ a.double().flatten(1)).view_as(weight)
    torch.testing.assert_close(got, inner(x))


def test_nothing_stays_and_scale_0_hooks_nothing() -> None:
    inner, x = model(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    change, plain = change_of(inner), inner(x)
    with change.applied(0.0):
        assert torch.equal(inner(x), plain) and not any(m._forward_hooks for m in inner)
    with pytest.raises(RuntimeError, match="stop"), change.applied():
        assert not torch.equal(inner(x), plain)
        raise RuntimeError("stop")
    assert torch.equal(inner(x), plain)


def test_factors_are_stored_and_loaded() -> None:
    inner = model()
    first, second = change_of(inner), LowRank(inner, ".", 2, torch.Generator().manual_seed(2))
    second.load(first.state())
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="rank=0"):
        LowRank(model(), ".", 0, torch.Generator())
    with pytest.raises(InputError, match="no linear or convolutional layer"):
        LowRank(model(), "^1$", 2, torch.Generator())
