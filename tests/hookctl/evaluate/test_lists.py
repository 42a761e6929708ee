"""Shares of a division, each for its own queries alone, against every text for every query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Site
from hookctl.attention.call import AttentionCall
from hookctl.attention.division import Division
from hookctl.attention.query_lists import QueryLists, TextPlace
from hookctl.errors import InputError
from hookctl.evaluate import plan

N, TEXT, WIDE = 24, 5, 19
IN_ROWS = {"one": TextPlace(5, 9, 0), "two": TextPlace(5, 12, 2), "three": TextPlace(12, 16, 2)}
OF_EACH = {"one": TextPlace(5, 9), "two": TextPlace(9, 16), "three": TextPlace(16, 19)}


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def stacks(sub: int) -> list[Tensor]:
    """q, and k and v with the further texts, of an unconditional and two conditional rows."""
    return [random(3, sub, 2, n, 8, seed=n + i) for i, n in enumerate((N, WIDE, WIDE))]


def call_of(given: list[Tensor], places: dict[str, TextPlace]) -> AttentionCall:
    q, k, v = given
    rows = Rows([Row(0, "uncond", 0, 0), Row(1, "cond", 0, 0), Row(2, "cond", 0, 1)])
    call = AttentionCall(
        Site("attn", "cross", "mid", 0, 0),
        q,
        k[..., :TEXT, :],
        v[..., :TEXT, :],
        rows=rows,
        clock=Clock(0, 4, 999.0),
        scale=8**-0.5,
        context=places,
    )
    call.set_context_source(k, v)
    return call


def shares(kind: str) -> dict[str, Tensor]:
    place = torch.arange(N)
    if kind == "hard":
        found = [(place < 7), (place >= 7) & (place < 10), place >= 20]
        return dict(zip(IN_ROWS, [0.8 * one.double() for one in found], strict=True))
    if kind == "overlapping":
        return {name: (0.3 * (place % (i + 2) == 0)).double() for i, name in enumerate(IN_ROWS)}
    weights = random(3, N, seed=5).softmax(0) * (place < 20)
    return dict(zip(IN_ROWS, weights, strict=True))


@pytest.mark.parametrize("kind", ["hard", "overlapping", "soft"])
@pytest.mark.parametrize("places", [IN_ROWS, OF_EACH], ids=["once", "of each row"])
@pytest.mark.parametrize("sub", [1, 3])
def test_every_text_for_every_query(kind: str, places: dict[str, TextPlace], sub: int) -> None:
    hidden = torch.tensor([0.0, 0.0, 0.0, float("-inf")], dtype=torch.float64)
    given, found = stacks(sub), dict[str, Tensor]()
    for backend in ("reference", "auto", "sdpa"):
        call = call_of(given, places)
        call.divide((1, 2), Division(shares(kind), {"one": hidden}))
        found[backend], _ = plan.evaluate(call, backend)
    for backend in ("auto", "sdpa"):
        torch.testing.assert_close(found[backend], found["reference"], rtol=0, atol=1e-12)
    assert not torch.equal(found["auto"][1], found["auto"][2])


def test_gradients_and_functions_of_the_probabilities() -> None:
    found: dict[str, list[Tensor]] = {}
    for backend in ("reference", "auto"):
        given = [x.requires_grad_() for x in stacks(1)]
        call = call_of(given, IN_ROWS)
        call.divide((1, 2), Division(shares("soft")))
        call.probabilities(2, lambda p: p.square())
        out, _ = plan.evaluate(call, backend)
        found[backend] = [out, *torch.autograd.grad(out.square().sum(), given)]
    for ours, exact in zip(found["auto"], found["reference"], strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11)


def test_the_work_is_that_of_the_places_covered() -> None:
    """However many shares there are: lists have the length of most, and no more places than twice
    those that are covered."""
    for parts in (2, 8, 32):
        which = torch.arange(64) * parts // 64
        lists = QueryLists((which == torch.arange(parts)[:, None]).float(), [None] * parts, which)
        assert tuple(lists.places.shape) == (parts, 64 // parts) and len(lists.back) == 1
    sizes = [1000, 30, 28, 31]
    uneven = torch.zeros(4, sum(sizes))
    for share, places in zip(uneven, torch.arange(sum(sizes)).split(sizes), strict=True):
        share[places] = 1
    assert QueryLists(uneven, [None] * 4, uneven).places.numel() < 2 * sum(sizes)


def test_a_shift_for_other_tokens() -> None:
    call = call_of(stacks(1), IN_ROWS)
    with pytest.raises(InputError, match=r"shift of 'one' is \(3,\); its text has 4"):
        call.divide(1, Division(shares("hard"), {"one": torch.zeros(3)}))


def test_a_text_that_one_row_has_is_every_rows_to_read() -> None:
    given = stacks(1)
    k, v = call_of(given, IN_ROWS).context("two")
    for row in range(3):
        assert torch.equal(k[row], given[1][2, ..., 5:12, :])
        assert torch.equal(v[row], given[2][2, ..., 5:12, :])
