"""What single verbs promise: none of no strength is noted; isolation, mapped queries, marginals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.address.sites import Grid, ImageTokens
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError
from hookctl.evaluate import plan
from tests import zoo
from tests.hookctl.attention.calls import IMAGE, ROWS, TEXT, Case, close, make, random
from tests.hookctl.evaluate.verbs import BACKENDS, EXACT

JOINT = ("text_image", "image_text")
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


# -- isolate, map_queries --------------------------------------------------------------------------


def under_mask(case: Case, mask: Tensor) -> Tensor:
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
        close(out[3:5], under_mask(case, seen)[3:5], EXACT, "isolated")
        close(out[:3], under_mask(case, torch.ones_like(seen))[:3], EXACT, "the others")


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
    close(plan.evaluate(call)[0][3], under_mask(case, seen & hidden)[3], EXACT)


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("kind", JOINT)
def test_isolated_beside_references(kind: str, target: int) -> None:
    """The image that is drawn sees the text and the reference, which see everything."""
    case = make(kind)
    call = case.call()
    sides = [Grid(2, 4), Grid(1, 4)] if target == 0 else [Grid(1, 4), Grid(2, 4)]
    call.sequence = TEXT, kind, ImageTokens(tuple(sides), target)
    (start, stop), n = call.spans.image_queries, IMAGE + TEXT
    assert stop - start == 8 and call.spans.references
    seen = torch.ones(n, n, dtype=torch.bool)
    seen[start:stop, start:stop] = torch.eye(8, dtype=torch.bool)
    call.isolate(3)
    close(plan.evaluate(call)[0][3], under_mask(case, seen)[3], EXACT)


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
    for verb in ("marginals", "read_queries"):
        given = () if verb == "marginals" else ([0],)
        with pytest.raises(UnsupportedError, match=f"{verb}: .* attends to a text"):
            getattr(make("cross").call(), verb)(3, *given, print)


@pytest.mark.parametrize("queries", [(), (-1,), (0, IMAGE)])
def test_queries_that_are_none(queries: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"are not among the {IMAGE} image queries"):
        make("self").call().read_queries(3, queries, print)


def test_lines_of_queries_have_gradients() -> None:
    case, seen = make("self"), []
    case.q.requires_grad_()
    call = case.call()
    call.read_queries(2, [1], lambda row, p: seen.append(p))
    plan.read_only(call)
    (gradient,) = torch.autograd.grad(seen[0][..., 0].sum(), case.q)
    assert gradient[2, ..., 1, :].any() and not gradient[2, ..., 2:, :].any()


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (lambda call: call.v.mul_(0), r"changed call.v in place at .*call.replace\(rows"),
        (lambda call: call.k[0].zero_(), "changed call.k in place"),
        (lambda call: call.q.copy_(call.q + 1), "changed call.q in place"),
    ],
)
def test_changes_in_place_are_an_error(change: Any, cure: str) -> None:
    class Careless(Editor):
        def attention(self, call: AttentionCall) -> None:
            change(call)

    pipe = zoo.PIPELINES["sd15"].make()
    with hookctl.control(pipe, Careless()), pytest.raises(InputError, match=f"Careless.*{cure}"):
        zoo.PIPELINES["sd15"].run(pipe)
