"""Masked self-attention against an explicit mask, and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl.address.regions import Region
from hookctl.address.sites import Grid
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError
from hookctl.evaluate import plan
from hookctl.recipes import MaskedSelfAttention
from tests import zoo

A = "a red cat above a blue square"
TWO = ["box:0,0,0.5,0.5", (0.5, 0.5, 1, 1)]


def allowed(edit: MaskedSelfAttention, size: int) -> Tensor:
    """What the words of the rule say, token by token: [N, N]."""
    members = torch.stack([r.tokens(size, size) for r in edit.regions[0]])
    outside = ~members.any(0)
    share = (members[:, :, None] & members[:, None, :]).any(0)
    among = outside[:, None] & outside[None]
    if edit.background == "all":
        among = outside[:, None].expand_as(share)
    if edit.background == "itself":
        among = torch.eye(len(outside), dtype=torch.bool) & outside
    return share | among | (~outside[:, None] & outside[None] if edit.open else share)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"background": "all"}, {"open": True}, {"background": "itself"}]
)
def test_the_rule(options: dict[str, Any], backend: str) -> None:
    edit = MaskedSelfAttention(TWO, **options)
    size = 8
    bits = edit.bits(0, Grid(size, size))
    mask = allowed(edit, size)
    queries, keys, alone = bits
    seen = (queries[:, None] & keys[None]) != 0
    if alone is not None:
        seen = torch.where(alone[:, None] > 0, torch.eye(len(seen), dtype=torch.bool), seen)
    assert torch.equal(seen, mask)
    assert bool(mask.any(1).all()), "a query was left without keys"

    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    edit.sites = "self @1"
    worst: list[float] = []

    class Check(hookctl.Editor):
        """Compares each call with softmax under the explicit mask, in float64."""

        sites = "self @1"

        def attention(self, call: AttentionCall) -> None:
            out, _ = plan.evaluate(call, backend)
            q, k, v = (x.double() for x in (call.q, call.k, call.v))
            grid = call.grid
            assert grid is not None
            hidden = ~allowed(edit, grid.height)
            scores = (q @ k.mT * call.scale).masked_fill(hidden, float("-inf"))
            worst.append(float((scores.softmax(-1) @ v - out).abs().max()))

    with hookctl.control(pipe, edit, Check()):
        case.run(pipe, [A])
    assert worst and max(worst) < 1e-4


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_nothing_masked_is_bit_identical(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, [A])
    for edit in (
        MaskedSelfAttention([]),
        MaskedSelfAttention([Region.full()]),
        MaskedSelfAttention(TWO, stop=0.0),
    ):
        with hookctl.control(pipe, edit):
            assert torch.equal(case.run(pipe, [A]), plain)
    with hookctl.control(pipe, MaskedSelfAttention(TWO)):
        assert not torch.equal(case.run(pipe, [A]), plain)
    assert torch.equal(case.run(pipe, [A]), plain)


def test_as_the_official_code() -> None:
    """Only the finest sites; the background cut off from itself."""
    pipe = zoo.PIPELINES["sd15"].make()
    edit = MaskedSelfAttention(TWO, paper=True)
    with hookctl.control(pipe, edit) as session:
        zoo.PIPELINES["sd15"].run(pipe, [A])
    touched = {row[1] for row in session.log.rows()}
    assert touched and all(label.endswith("@1") for label in touched)
    assert edit.background == "itself"


def test_prompts_have_their_own_regions() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    plain = case.run(pipe, [A, A])
    with hookctl.control(pipe, MaskedSelfAttention([[], TWO])):
        found = case.run(pipe, [A, A])
    assert (found[0] - plain[0]).abs().max() < 1e-4 * plain.abs().max()
    assert (found[1] - plain[1]).abs().max() > 1e-3


def test_bad_input() -> None:
    with pytest.raises(InputError, match="itself"):
        MaskedSelfAttention(TWO, background="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"regions\[1\]"):
        MaskedSelfAttention([TWO[0], "box:1"])
    pipe = zoo.PIPELINES["sd15"].make()
    with (
        pytest.raises(InputError, match="draws 1"),
        hookctl.control(pipe, MaskedSelfAttention([TWO, TWO])),
    ):
        zoo.PIPELINES["sd15"].run(pipe, [A])
    flux = zoo.PIPELINES["flux"].make()
    with (
        pytest.raises(UnsupportedError, match="joint"),
        hookctl.control(flux, MaskedSelfAttention(TWO, background="itself")),
    ):
        zoo.PIPELINES["flux"].run(flux, [A])
