"""FreeU: its laws, and against diffusers' own. (Its filter: tests/kernels/test_fourier_gain.py.)"""

from __future__ import annotations

import pytest
import torch

import hookctl
from hookctl.errors import InputError
from hookctl.recipes.freeu import FreeU
from tests import zoo


def test_gains_of_one_are_bit_identical() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    plain = case.run(pipe, ["a red cat"])
    with hookctl.control(pipe, FreeU(1, 1, 1, 1)):
        assert torch.equal(case.run(pipe, ["a red cat"]), plain)
    with hookctl.control(pipe, FreeU()):
        assert not torch.equal(case.run(pipe, ["a red cat"]), plain)
    assert torch.equal(case.run(pipe, ["a red cat"]), plain)


@pytest.mark.parametrize("name", ["sd15", "animatediff"])  # the latter gives concats by name
def test_the_diffusers_rule_equals_enable_freeu(name: str) -> None:
    case = zoo.PIPELINES[name]
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
