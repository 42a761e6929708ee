"""The verbs that guidance by perturbation is made of, against explicit matrices in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.errors import UnsupportedError
from hookctl.evaluate import plan
from tests.hookctl.attention.calls import IMAGE, ROWS, TEXT, Case, close, make, random

EXACT = 1e-10
JOINT = ("text_image", "image_text")
BACKENDS = ("sdpa", "reference", "auto")


def masked(case: Case, mask: Tensor) -> Tensor:
    return (case.q @ case.k.mT * case.scale).masked_fill(~mask, -torch.inf).softmax(-1) @ case.v


def image_of(case: Case) -> slice:
    return slice(*case.call().spans.image_queries)


@pytest.mark.parametrize("sub", [1, 3])
@pytest.mark.parametrize("kind", JOINT)
def test_isolated_image_tokens(kind: str, sub: int) -> None:
    """The image's own block of the mask is the identity, all else is seen."""
    case = make(kind, sub=sub)
    n, image = IMAGE + TEXT, image_of(case)
    seen = torch.ones(n, n, dtype=torch.bool)
    seen[image, image] = torch.eye(IMAGE, dtype=torch.bool)
    for backend in BACKENDS:
        call = case.call()
        call.isolate((3, 4))
        out = plan.evaluate(call, backend)[0]
        close(out[3:5], masked(case, seen)[3:5], EXACT, "isolated")
        close(out[:3], masked(case, torch.ones_like(seen))[:3], EXACT, "the others")


@pytest.mark.parametrize("form", ["bool", "additive", "per query"])
def test_isolated_under_the_models_mask(form: str) -> None:
    case = make("text_image")
    n, image = IMAGE + TEXT, image_of(case)
    hidden = torch.ones(5, 1, 1, 1, n, dtype=torch.bool)
    hidden[3, ..., 2:TEXT] = False
    seen = torch.ones(n, n, dtype=torch.bool)
    seen[image, image] = torch.eye(IMAGE, dtype=torch.bool)
    mask = {
        "bool": hidden,
        "additive": torch.zeros(hidden.shape).masked_fill(~hidden, -torch.inf).double(),
        "per query": hidden.expand(5, 1, 1, n, n),
    }[form]
    case.mask = mask
    call = case.call()
    call.isolate(3)
    close(plan.evaluate(call)[0][3], masked(case, seen & hidden)[3], EXACT)


def test_isolated_after_substitution() -> None:
    """What the row borrowed is isolated; on a self-attention site that is the values."""
    case, source = make("image_text"), make("image_text")
    source.q, source.v = case.q[[0, 1, 2, 2, 4]], case.v[[0, 1, 2, 1, 4]]
    call, plain = case.call(), source.call()
    call.isolate(3)
    call.borrow(3, q=2, v=1)
    plain.isolate(3)
    close(plan.evaluate(call)[0][3], plan.evaluate(plain)[0][3], EXACT)
    case = make("self")
    call = case.call()
    call.isolate(3)
    call.borrow(3, v=2)
    close(plan.evaluate(call)[0][3], case.v[2], EXACT)
    with pytest.raises(UnsupportedError, match="identity attention"):
        make("cross").call().isolate(3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [0, 1])
def test_mapped_queries_are_the_substituted_ones(backend: str, order: int) -> None:
    """Whoever speaks first: the queries that a row borrows are mapped."""
    case = make("self")
    call = case.call()
    verbs = [lambda c: c.map_queries((3, 4), torch.neg), lambda c: c.borrow(3, q=2)]
    for verb in verbs if order else verbs[::-1]:
        verb(call)
    out = plan.evaluate(call, backend)[0]
    want = [
        (-case.q[r] @ case.k[own].mT * 0.5).softmax(-1) @ case.v[own] for r, own in ((2, 3), (4, 4))
    ]
    close(out[3:5], torch.stack(want), EXACT)
    close(out[2], (case.q[2] @ case.k[2].mT * 0.5).softmax(-1) @ case.v[2], EXACT, "the lender")


# -- marginals -------------------------------------------------------------------------------------

half = (torch.arange(IMAGE) < 5).double()
regions = torch.tensor([1, 3] * (IMAGE // 2))
SCRIPTS: dict[str, Any] = {
    "plain": lambda c: None,
    "borrow": lambda c: c.borrow(3, q=2, where=half),
    "extend": lambda c: c.extend(3, 2, 2, shift=0.3),
    "restrict": lambda c: c.restrict(3, regions, torch.arange(IMAGE) % 4),
    "bias": lambda c: c.bias(3, query_factors=random(IMAGE, 2), key_factors=random(IMAGE, 2)),
    "route": lambda c: c.route(3, 2, blend=half, gain=random(IMAGE, seed=4)),
    "skip": lambda c: c.skip(3),
    "probabilities": lambda c: c.probabilities(3, lambda p: p.square()),
    "isolate": lambda c: c.isolate(3),
}


@pytest.mark.parametrize("sub", [1, 3])
@pytest.mark.parametrize("name", SCRIPTS)
def test_marginals_are_column_sums(name: str, sub: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the edited map, whatever edited it, a few queries at a time."""
    monkeypatch.setattr("hookctl.evaluate.reference._CHUNK", 5)
    seen: dict[str, Tensor] = {}
    for mask in (None, random(5, 1, 1, 1, IMAGE, seed=3), random(5, 1, 1, IMAGE, IMAGE, seed=3)):
        call = make("self", sub=sub, mask=mask).call()
        SCRIPTS[name](call)
        call.read(3, range(IMAGE), lambda row, p: seen.update(read=p.sum(1)))
        call.marginals(3, lambda row, s: seen.update(sums=s))
        plan.evaluate(call)
        close(seen["sums"], seen["read"], EXACT)


@pytest.mark.parametrize("kind", JOINT)
def test_marginals_among_the_image(kind: str) -> None:
    case, seen = make(kind), []
    call, image = case.call(), image_of(case)
    call.marginals(ROWS[2], lambda row, s: seen.append((row, s)))
    plan.read_only(call)
    [(row, sums)] = seen
    p = (case.q[2] @ case.k[2].mT * case.scale).softmax(-1).mean(1)
    assert row == ROWS[2]
    close(sums, p[:, image, image].sum(1), EXACT)
    with pytest.raises(UnsupportedError, match="attends to a text"):
        make("cross").call().marginals(3, print)
