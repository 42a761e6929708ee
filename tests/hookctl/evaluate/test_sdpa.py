"""Which rows attend together by SDPA, and regions of keys without a matrix."""

from __future__ import annotations

import pytest
import torch

from hookctl.attention.call import AttentionCall
from hookctl.evaluate import plan, sdpa
from tests.hookctl.attention.calls import Case, Script, close, make, random, torch_calls
from tests.hookctl.evaluate.verbs import EXACT, SIGN, check, masked, scripts, softmax


def calls(case: Case, script: Script) -> int:
    return torch_calls(case, script)["scaled_dot_product_attention"]


def swap(c: AttentionCall) -> None:
    """Prompt-to-Prompt's self-replacement: two rows take q and k from a third."""
    c.borrow((3, 4), q=2, k=2)


@pytest.mark.parametrize("mask", ("none", "bool", "full"))
@pytest.mark.parametrize("kind", ("self", "text_image"))
def test_rows_read_where_they_lie(kind: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large calls nothing is copied for rows that nothing rewrote: small ones are not all."""
    monkeypatch.setattr(sdpa, "_FEW_QUERIES", 0)
    case = masked(kind, mask)
    assert calls(case, swap) == 2
    for script in scripts(case).values():
        check(case, script, maps=False)


def test_one_call_where_copies_are_cheap() -> None:
    case = masked("self", "none")
    assert calls(case, swap) == 1
    assert calls(case, lambda c: c.borrow(0, k=3, v=3)) == 1
    # Another sum than the others', or copies of whole masks: on their own.
    assert calls(case, lambda c: c.extend(4, 2, 2)) == 2
    assert calls(case, lambda c: c.borrow(4, k=2, v=2, where=torch.full((12,), 0.5))) == 3
    assert calls(masked("self", "bool"), swap) == 1
    assert calls(masked("self", "full"), swap) == 2


@pytest.mark.parametrize("few", [0, sdpa._FEW_SCORES], ids=["kind by kind", "by a mask"])
def test_regions_partition(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disjoint regions are attentions of their own; a query in none of them gives 0."""
    monkeypatch.setattr(sdpa, "_FEW_SCORES", few)
    case = make("self")
    labels = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2, SIGN, SIGN, SIGN, 0])
    check(case, lambda c: c.restrict(3, labels, labels))
    call = case.call()
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    call.restrict(3, labels, labels)
    out = plan.evaluate(call)[0][3]
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][3, ..., 11, :].any()
    for part in (slice(0, 4), slice(4, 8), slice(8, 11)):
        q, k, v = (x[3][..., part, :] for x in (case.q, case.k, case.v))
        close(out[..., part, :], softmax(q, k, case.scale) @ v, EXACT)
    assert (out[..., 11, :] == 0).all()


@pytest.mark.parametrize("many", [3, 64, 90])
def test_many_kinds_of_queries(many: int) -> None:
    """Few kinds attend kind by kind, many by chunks of a mask; with biases and a mask too."""
    case = make("self")
    n = 300
    case.q, case.k, case.v = (random(5, 1, 2, n, 8, seed=i) for i in range(3))
    case.mask = random(5, 1, 1, 1, n, seed=3)
    queries = torch.arange(n) % many * 7919
    keys = (random(n, seed=8) * 1e4).long()
    factors = random(n, 2, seed=9), random(n, 2, seed=10)
    check(case, lambda c: c.restrict(3, queries, keys))
    check(
        case,
        lambda c: c.restrict(3, queries, keys),
        lambda c: c.bias(3, query_factors=factors[0], key_factors=factors[1]),
        lambda c: c.extend(3, 2, 2),
    )
