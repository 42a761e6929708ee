"""Every dtype, and gradients, against the explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hookctl.attention.call import AttentionCall
from hookctl.attention.term import Ref, Segment, Sum, Term, Terms
from hookctl.evaluate import plan, reference, sdpa
from tests.hookctl.attention.calls import Case, close, make, random
from tests.hookctl.evaluate.verbs import PAIRED, masked, scripts

# Of the largest element: a few units of the last place of what q, k, v and the output are held in.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
TRIED = tuple(name for name in PAIRED if name != "probabilities") + ("route twice", "extend twice")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ("cross", "self", "text_image"))
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    case = make(kind)
    exact = Case(kind, *(x.to(dtype).double() for x in (case.q, case.k, case.v)), case.scale)
    rough = Case(kind, *(x.to(dtype) for x in (exact.q, exact.k, exact.v)), case.scale)
    verbs = scripts(case)
    for name in TRIED:
        if name in verbs:
            explicit = exact.explicit()
            verbs[name](explicit)
            for backend in ("auto", "sdpa"):
                call = rough.call()
                verbs[name](call)
                out, _ = plan.evaluate(call, backend)
                assert out.dtype == dtype
                close(out, explicit.output(), TOLERANCES[dtype], f"{name} by {backend}")


@pytest.mark.parametrize("mask", ("none", "bool"))
@pytest.mark.parametrize("kind", ("cross", "self", "text_image"))
def test_gradients(kind: str, mask: str) -> None:
    """Of the output and of read-outs, with respect to q, k and v of every row."""
    case = masked(kind, mask)
    verbs = scripts(case)
    weights = random(*case.q.shape[:-1], case.v.shape[-1], seed=50)
    for name in TRIED:
        if name not in verbs:
            continue
        found: list[list[Tensor]] = []
        for backend in ("explicit", "auto", "sdpa"):
            leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
            here = Case(kind, *leaves, case.scale, case.mask)
            maps: list[Tensor] = []
            if backend == "explicit":
                explicit = here.explicit()
                verbs[name](explicit)
                out = explicit.output()
                image = slice(*here.call().spans.image_queries)
                maps.append(explicit.maps(3, [0, 1])[:, image])
            else:
                call = here.call()
                verbs[name](call)
                call.read(3, [0, 1], lambda row, p, maps=maps: maps.append(p))
                out, _ = plan.evaluate(call, backend)
            total = (out * weights).sum() + maps[0].square().sum()
            found.append(list(torch.autograd.grad(total, leaves)))
        for grads in found[1:]:
            for got, want, leaf in zip(grads, found[0], "qkv", strict=True):
                close(got, want, 1e-9, f"{name}: gradient of {leaf}")  # float64


def test_learned_arguments() -> None:
    """Token maps, weights and biases that are being learned get gradients, from zero too."""
    case = make("cross")
    n, t = case.q.shape[-2], case.k.shape[-2]
    made = {
        "gain": torch.ones(t, dtype=torch.float64),
        "where": torch.zeros(n, dtype=torch.float64),
        "keys": torch.zeros(t, dtype=torch.float64),
        "mask": torch.zeros(n, dtype=torch.float64),
    }
    grads = []
    for explicit in (True, False):
        given = {name: x.clone().requires_grad_() for name, x in made.items()}
        c = case.explicit() if explicit else case.call()
        c.borrow(3, k=2, v=2, where=given["where"])
        c.bias(3, key_factors=given["keys"])
        c.route(3, None, gain=given["gain"])
        c.add(3, random(2, 5, 8), random(2, 5, 8, seed=1), mask=given["mask"])
        out = c.output() if explicit else plan.evaluate(c)[0]
        grads.append(torch.autograd.grad(out.square().sum(), list(given.values())))
    for name, want, got in zip(made, *grads, strict=True):
        close(got, want, 1e-9, name)  # float64


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_scores_are_not_formed_in_half_precision(dtype: torch.dtype) -> None:
    """Scores of 20 and more, as real models have, are told apart by less than half precision has;
    unscaled ones may lie beyond float16."""
    case = make("text_image")
    q, k, v = ((x * factor).to(dtype) for x, factor in ((case.q, 4), (case.k, 4), (case.v, 1)))
    exact = Case(case.kind, q.double(), k.double(), v.double(), case.scale)
    rough = Case(case.kind, q, k, v, case.scale)
    for edit in (isolated, escaped):
        explicit, call = exact.call(), rough.call()
        edit(explicit)
        edit(call)
        wanted, out = plan.evaluate(explicit, "reference")[0], plan.evaluate(call)[0]
        close(out, wanted, TOLERANCES[dtype] / 2, edit.__name__)


def isolated(call: AttentionCall) -> None:
    call.isolate(call.rows)


def escaped(call: AttentionCall) -> None:
    call.probabilities(call.rows, lambda p: p)


def test_scores_beyond_float16_are_finite() -> None:
    q = torch.full((1, 1, 1, 4, 64), 40.0, dtype=torch.float16)  # q k is 102400, scaled 12800
    term = Term(Ref(q, 0), (Segment(Ref(q, 0), Ref(q, 0)),), 0.125)
    assert torch.equal(reference.probabilities(term, None), torch.full((1, 1, 4, 4), 0.25).half())


def test_a_strong_bias_of_some_queries_is_finite_in_float16() -> None:
    q, k, v = (random(1, 1, 2, 8, 64, seed=seed).half() for seed in (1, 2, 3))
    half = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float16)[:, None]
    own = Segment(Ref(k, 0), Ref(v, 0))
    term = Term(Ref(q, 0), (own,), 0.125, factors=((half, half.flip(0) * -1e4),))
    terms = Terms(q, k, v, 0.125)
    terms[0] = (term,)
    ((_, out),) = sdpa.evaluate(Sum(terms, 1), [0])
    ((_, exact),) = reference.evaluate(Sum(terms, 1), [0])
    close(out, exact, TOLERANCES[torch.float16], "bias")
