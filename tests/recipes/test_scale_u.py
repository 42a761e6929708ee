"""ScaleU: zero parameters change nothing; gains as in the formula; learned ones get gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.state import FeatureCall
from hookctl.recipes import ScaleU
from tests import zoo
from tests.kernels.test_fourier_gain import by_transform

A = "a red cat"


def test_zero_parameters_are_bit_identical() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    plain = case.run(pipe, [A])
    for edit in (ScaleU(), ScaleU([0.0] * 4, [0.0] * 4), ScaleU({0: 0.5}, stop=0.0)):
        with hookctl.control(pipe, edit):
            assert torch.equal(case.run(pipe, [A]), plain)
    with hookctl.control(pipe, ScaleU({0: 0.5}, {1: -0.5})):
        assert not torch.equal(case.run(pipe, [A]), plain)
    assert torch.equal(case.run(pipe, [A]), plain)


@pytest.mark.parametrize("by_structure", [False, True])
def test_the_formula(by_structure: bool) -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}

    class Look(hookctl.Editor):
        def __init__(self, when: str) -> None:
            self.when = when

        def features(self, call: FeatureCall) -> None:
            if call.order == 2:
                seen[self.when] += [call.backbone.double(), call.skip.double()]

    channels = pipe.unet.up_blocks[1].resnets[0].in_channels - 32
    b = torch.randn(channels, generator=torch.Generator().manual_seed(0))
    edit = ScaleU({2: b}, {2: -0.4}, by_structure=by_structure)
    with hookctl.control(pipe, Look("before"), edit, Look("after")):
        zoo.PIPELINES["sd15"].run(pipe, [A], steps=1)
    (h, r), (h_new, r_new) = seen["before"], seen["after"]
    gain = torch.tanh(b.double())[None, :, None, None]
    if by_structure:
        mean = h.mean(1, keepdim=True)
        low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
        gain = gain * (mean - low) / (high - low)
    assert (h_new - h * (1 + gain)).abs().max() < 1e-5
    s = 1 + float(torch.tanh(torch.tensor(-0.4)))
    assert (
        r_new - by_transform(r.double(), torch.full((r.shape[1],), float(s)))
    ).abs().max() < 1e-4


def test_gains_can_be_learned() -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    b, s = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)
    with hookctl.control(pipe.unet, ScaleU({0: b}, {0: s}), rows=("cond",)):
        pipe.unet(latents, 10, text).sample.square().mean().backward()
    assert float(b.grad.abs()) > 0 and float(s.grad.abs()) > 0


def test_the_keys_of_the_official_checkpoint() -> None:
    weights = {"scaleu_b_0": torch.ones(3), "scaleu_s_11": torch.ones(1), "conv_in.weight": b""}
    edit = ScaleU.from_state_dict(weights)  # type: ignore[arg-type]
    assert set(edit.backbone) == {0} and set(edit.skip) == {11}
    with pytest.raises(InputError, match="scaleu_b_0"):
        ScaleU.from_state_dict({})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backbone": ["much"]}, "backbone"),
        ({"backbone": [float("nan")]}, "finite"),
        ({"skip": [[1.0, 2.0]]}, "one number"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ScaleU(**arguments)


def test_refused_where_there_is_no_such_concat() -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    with pytest.raises(InputError, match="lacks"):
        hookctl.control(pipe, ScaleU({40: 0.1})).__enter__()
    with pytest.raises(InputError, match="channels"):
        hookctl.control(pipe, ScaleU([[0.1, 0.2, 0.3]])).__enter__()
    with pytest.raises(UnsupportedError, match="skip connections"):
        hookctl.control(zoo.PIPELINES["flux"].make(), ScaleU([0.1])).__enter__()
