"""Latent mixing: kernels and references against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hookctl.kernels.latent_mixing import forward, mix_predictions, reference
from tests.kernels.closeness import DEVICE, TOLERANCE, close, random

Form = Callable[..., Tensor]
DTYPES = list(TOLERANCE)
SHAPE = (3, 2, 5, 7)  # one row is more than one program's places


@pytest.mark.parametrize("form", [forward.local_blend, reference.local_blend])
def test_a_hard_blend_copies_bits(form: Form) -> None:
    x = random(*SHAPE, dtype=torch.float16).transpose(2, 3)
    sources = torch.tensor([0, 0, 1], device=DEVICE)
    mask = random(3, 7, 5, seed=1) > 0
    out = form(x, sources, mask)
    for row, source in enumerate((0, 0, 1)):
        assert torch.equal(out[row], torch.where(mask[row], x[row], x[source]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [forward.local_blend, reference.local_blend])
def test_a_soft_blend(form: Form, dtype: torch.dtype) -> None:
    x, mask = random(*SHAPE, dtype=dtype), random(1, 5, 7, seed=1).sigmoid()
    sources = torch.tensor([0, 0, 1], device=DEVICE)
    exact = x.double()
    want = exact[sources] + mask[:, None].double() * (exact - exact[sources])
    close("out", form(x, sources, mask), want, TOLERANCE[dtype])


@pytest.mark.parametrize("form", [forward.local_blend, reference.local_blend])
def test_one_source_for_all(form: Form) -> None:
    x, mask = random(*SHAPE), random(1, 5, 7, seed=1) > 0
    source = torch.ones(1, dtype=torch.long, device=DEVICE).expand(3)
    assert torch.equal(form(x, source, mask), torch.where(mask, x, x[1]))


@pytest.mark.parametrize("blend", [forward.local_blend, reference.local_blend])
@pytest.mark.parametrize("merge", [forward.merge_instances, reference.merge_instances])
def test_shares_of_nothing_and_of_all_copy_bits(blend: Form, merge: Form) -> None:
    x, inside = random(*SHAPE), random(3, 5, 7, seed=1) > 0
    sources = torch.tensor([0, 0, 1], device=DEVICE)
    assert torch.equal(blend(x, sources, inside.float()), blend(x, sources, inside))
    want = torch.where(inside[2], x[2], torch.where(inside[1], x[1], x[0]))
    assert torch.equal(merge(x, inside[1:].float()), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [forward.merge_instances, reference.merge_instances])
def test_merging(form: Form, dtype: torch.dtype) -> None:
    x, masks = random(*SHAPE, dtype=dtype), random(2, 5, 7, seed=1) > 0
    close("mean", form(x, None), x.double().mean(0), TOLERANCE[dtype])
    want = torch.where(masks[1], x[2], torch.where(masks[0], x[1], x[0]))
    close("pasted", form(x, masks), want.double(), TOLERANCE[dtype])
    assert torch.equal(form(x[:1], None), x[0]) and torch.equal(form(x[:1], masks[:0]), x[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [forward.mix_predictions, reference.mix_predictions])
def test_mixing(form: Form, dtype: torch.dtype) -> None:
    a, b = random(*SHAPE, dtype=dtype), random(*SHAPE, seed=1, dtype=dtype)
    maps = random(2, 1, 5, 7, seed=2).double()
    shares = maps.softmax(0)[:, :, None]
    want = shares[0] * a.double() + shares[1] * b.double()
    close("out", form(a, b, (maps[0] - maps[1]).float()), want, TOLERANCE[dtype])


@pytest.mark.parametrize("form", [forward.update_difference, reference.update_difference])
def test_the_update_is_that_of_both_maps(form: Form) -> None:
    """Two maps, each after a gradient step of a loss of the trial latent x' = A x + B eps."""
    a, b, target = (random(*SHAPE, seed=i).double() for i in range(3))
    maps = random(2, 3, 5, 7, seed=3).double().requires_grad_()
    shares = maps.softmax(0)[:, :, None]
    trial = 0.3 * (shares[0] * a + shares[1] * b)
    loss = ((trial - target) ** 2).sum()
    grad, of_trial = torch.autograd.grad(loss, [maps, trial])
    after = maps.detach() - 0.7 * grad
    d = (maps[0] - maps[1]).detach().float()
    got = form(d, of_trial.float(), a.float(), b.float(), 0.7 * 0.3)
    want = after[0] - after[1]
    close("d", got, want, TOLERANCE[torch.float32])
    change = want - d
    tops = change.abs().flatten(1).amax(1)[:, None, None]
    for rate in (0.4, -0.4):
        got = form(d, of_trial.float(), a.float(), b.float(), rate, True)
        sign = math.copysign(1, rate)
        close("largest", got, d + sign * 0.4 * change / tops, TOLERANCE[torch.float32])
    assert torch.equal(form(d, of_trial.float(), a.float(), a.float(), 0.4, True), d)


def test_compiled_without_graph_breaks_and_learned_by_reference() -> None:
    a, b, d = random(1, 2, 5, 7), random(1, 2, 5, 7, seed=1), random(1, 5, 7, seed=2)
    compiled = torch.compile(
        lambda a, b, d: forward.mix_predictions(a * 2, b, d), fullgraph=True, backend="aot_eager"
    )
    close("out", compiled(a, b, d), reference.mix_predictions(a * 2, b, d).double(), 5e-6)
    leaf = d.clone().requires_grad_()
    mix_predictions(a, b, leaf).sum().backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
