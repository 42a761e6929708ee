"""Every dtype, and gradients, against the explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hookctl.evaluate import plan
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
