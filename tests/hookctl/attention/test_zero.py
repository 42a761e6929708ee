"""Verbs of no strength note nothing, and rows that nothing touches keep the model's own bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.call import AttentionCall
from hookctl.evaluate import plan
from tests.hookctl.attention.calls import IMAGE, TEXT, Case, make, random

ones = torch.ones(IMAGE, dtype=torch.float64)
NOTHING: dict[str, Callable[[AttentionCall], Any]] = {
    "borrow from itself": lambda c: c.borrow(3, q=3, k=3, v=3),
    "borrow nowhere": lambda c: c.borrow(3, k=2, v=2, where=0 * ones),
    "borrow for nobody": lambda c: c.borrow((), k=2),
    "replace by itself": lambda c: c.replace((1, 3), q=c.q[[1, 3]], k=c.k[[1, 3]], v=c.v[[1, 3]]),
    "replace for nobody": lambda c: c.replace((), q=c.q[3]),
    "extend by nothing": lambda c: c.extend(3, random(2, 0, 8), random(2, 0, 8)),
    "extend by no share": lambda c: c.extend(3, 2, 2, share=0.0),
    "restrict to all": lambda c: c.restrict(
        3, torch.full((IMAGE,), -1), torch.full((c.k.shape[-2],), 4)
    ),
    "bias 0": lambda c: c.bias(3, key_factors=torch.zeros(c.k.shape[-2])),
    "bias of no query": lambda c: c.bias(
        3, query_factors=torch.zeros(IMAGE, 1), key_factors=torch.ones(c.k.shape[-2])
    ),
    "route blend 0": lambda c: c.route(3, 2, token_map=None, blend=0.0),
    "route itself": lambda c: c.route(3, None),
    "add scale 0": lambda c: c.add(3, random(2, 5, 8), random(2, 5, 8), scale=0.0),
    "add nowhere": lambda c: c.add(3, random(2, 5, 8), random(2, 5, 8), mask=0 * ones),
}


@pytest.mark.parametrize("kind", ("cross", "self"))
@pytest.mark.parametrize("verb", NOTHING)
def test_no_strength_no_operation(verb: str, kind: str) -> None:
    call = make(kind).call()
    NOTHING[verb](call)
    assert not call.operations


def test_everywhere_is_everywhere() -> None:
    """A borrowed form of weight 1 is one term, not two."""
    call = make("self").call()
    call.borrow(3, k=2, v=2, where=ones)
    assert len(call.fold().terms[3]) == 1


def test_only_rows_that_change_are_replaced() -> None:
    call = make("self").call()
    call.replace((1, 3), q=torch.stack([call.q[1], call.q[2]]))
    assert call.operations[0].rows == (3,)


def test_a_learned_replacement_is_kept() -> None:
    """Its gradient would be lost with it."""
    call = make("self").call()
    call.replace(3, v=call.v[3].clone().requires_grad_())
    assert call.operations[0].rows == (3,)


def plain(case: Case) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (case.q, case.k, case.v))
    return F.scaled_dot_product_attention(q, k, v, scale=case.scale).unflatten(0, (5, -1))


@pytest.mark.parametrize("kind", ("cross", "self"))
def test_reading_changes_nothing(kind: str) -> None:
    """A read alone notes no operation; and beside edits it leaves their output bit-identical."""
    case = make(kind)
    call = case.call()
    maps: list[Tensor] = []
    call.read((2, 3), [0, 1], lambda row, p: maps.append(p))
    assert not call.operations
    plan.read_only(call)
    assert len(maps) == 2 and maps[0].shape == (1, IMAGE, 2)
    assert torch.equal(plan.evaluate(call)[0], plain(case))
    outs = []
    for read in (False, True):
        call = case.call()
        call.borrow(3, k=2)
        if read:
            call.read(3, [0], lambda row, p: None)
        outs.append(plan.evaluate(call)[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_untouched_rows_keep_their_bits(dtype: torch.dtype) -> None:
    case = make("self", sub=2)
    case.q, case.k, case.v = (x.to(dtype) for x in (case.q, case.k, case.v))
    call = case.call()
    call.borrow((1, 3), q=2, k=2)
    call.replace(3, v=2 * call.v[3])
    out, chosen = plan.evaluate(call)
    assert chosen.name == "sdpa"
    assert torch.equal(out[[0, 2, 4]], plain(case)[[0, 2, 4]])


def test_same_as_the_source() -> None:
    """A row that is the source's copy, edited by the source, is the source."""
    case = make("cross")
    for x in (case.q, case.k, case.v):
        x[3] = x[2]
    call = case.call()
    call.route(3, 2, token_map=torch.eye(TEXT))
    call.borrow(3, q=2, k=2)
    out = plan.evaluate(call)[0]
    assert torch.equal(out[3], out[2])
