"""Softmaxes over short keys: block by block, and of several rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hookctl.evaluate import plan, short_softmax
from tests.hookctl.attention.calls import IMAGE, TEXT, Case, Script, close, random
from tests.hookctl.evaluate import test_precision
from tests.hookctl.evaluate.verbs import EXACT, MASKS, check, masked, scripts


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries of two heads in three blocks, the last a short one."""
    monkeypatch.setattr(short_softmax, "_BLOCK", 5 * 2 * TEXT)


def projected(case: Case) -> Case:
    """Laid out as projections give them: tokens before heads."""
    laid = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (case.q, case.k, case.v))
    return Case(case.kind, *laid, case.scale, case.mask)


class Formed(TorchFunctionMode):
    """How many probabilities are formed, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__ == "softmax":
            self.all += out.numel()
            self.most = max(self.most, out.numel())
        return out


def formed(case: Case, script: Script) -> Formed:
    call = case.call()
    script(call)
    with Formed() as counted:
        plan.evaluate(call)
    return counted


def softmaxes(case: Case, script: Script) -> int:
    """Of every query over a text, both heads."""
    return formed(case, script).all // (2 * IMAGE * TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_of_queries(blocks: None, mask: str) -> None:
    case = projected(masked("cross", mask))
    new = random(2, TEXT, 8)
    counted = formed(case, lambda c: c.add(3, new, new))
    assert counted.all == 6 * 2 * IMAGE * TEXT and counted.most <= 5 * 2 * TEXT
    for script in scripts(case).values():
        check(case, script)


@pytest.mark.parametrize("mask", ("none", "bool"))
def test_gradients_of_blocks(blocks: None, mask: str) -> None:
    test_precision.test_gradients("cross", mask)


@pytest.mark.parametrize("name", ("route blend", "route twice", "add twice", "borrow qk (P2P)"))
def test_gradients_of_rows_that_share(name: str) -> None:
    """Several rows are written to by one softmax, each a view of the same output."""
    case = projected(masked("cross", "none"))
    k, v = random(2, 5, 8), random(2, 5, 8, seed=1)
    weights, grads = random(*case.q.shape, seed=50), []
    for explicit in (True, False):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        here = Case("cross", *leaves, case.scale)
        c = here.explicit() if explicit else here.call()
        scripts(case)[name](c)
        c.add(tuple(range(5)), k, v, scale=0.6)
        out = c.output() if explicit else plan.evaluate(c)[0]
        grads.append(torch.autograd.grad((out * weights).sum(), leaves))
    for want, got in zip(*grads, strict=True):
        close(got, want, 10 * EXACT)


def test_uneven_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any limit, one below a single query too, covers every query once."""
    case = projected(masked("cross", "full"))
    for most in (1, 2 * TEXT, 7 * 2 * TEXT, IMAGE * 2 * TEXT - 1, IMAGE * 2 * TEXT):
        monkeypatch.setattr(short_softmax, "_BLOCK", most)
        check(case, scripts(case)["route blend"])


def same_keys(case: Case) -> dict[str, tuple[Script, int]]:
    """Edits whose keys are those of several rows, and how many softmaxes they take."""
    k, v, k2, v2 = (random(2, TEXT, 8, seed=60 + i) for i in range(4))
    unit = random(IMAGE, seed=65).sigmoid()
    word = random(TEXT, seed=66)
    every = tuple(range(5))
    return {
        "an adapter": (lambda c: c.add(every, k, v, scale=0.6), 10),
        "two adapters": (lambda c: (c.add(every, k, v), c.add(every, k2, v2, scale=-0.3)), 15),
        "of some rows": (lambda c: c.add((0, 1, 3, 4), k, v, scale=0.6), 9),
        "within a mask": (lambda c: c.add(every, k, v, mask=unit), 10),
        "beside routes": (
            lambda c: (c.route((3, 4), 2, gain=word), c.add(every, k, v, scale=0.6)),
            3 + 5,  # rows 3 and 4 have the probabilities of row 2
        ),
        "with shifted keys": (
            lambda c: (c.extend(every, k, v, shift=0.4), c.add(every, k2, v2)),
            5 * 2 + 5,
        ),
        "one text for all": (lambda c: c.replace(every, k=k, v=v), 5),
        "one text, mapped": (
            lambda c: (c.replace(every, k=k, v=v), c.route(every, None, gain=word)),
            5,
        ),
        "one source": (lambda c: c.borrow(every, q=2, k=2), 1),
    }


@pytest.mark.parametrize("mask", ("none", "additive"))
def test_rows_at_once(mask: str) -> None:
    case = projected(masked("cross", mask))
    for name, (script, count) in same_keys(case).items():
        check(case, script)
        if mask == "none":
            assert softmaxes(case, script) == count, name


def test_rows_at_once_in_blocks(blocks: None) -> None:
    case = projected(masked("cross", "none"))
    for script, _ in same_keys(case).values():
        check(case, script)


def test_several_frames() -> None:
    k, v = random(2, 5, 8), random(2, 5, 8, seed=1)
    for sub in (1, 3):
        check(masked("cross", "none", sub=sub), lambda c: c.add(tuple(range(5)), k, v, scale=0.6))


def test_the_output_and_its_maps_are_of_one_softmax() -> None:
    """Maps that several editors read of an edited call cost no softmax of their own."""
    case, found = projected(masked("cross", "none")), list[torch.Tensor]()
    edit = scripts(case)["route blend"]

    def read(c: Any) -> None:
        edit(c)
        for tokens in ((1, 2), (2, 4)):
            c.read((2, 3), tokens, lambda row, values: found.append(values))

    assert softmaxes(case, read) == softmaxes(case, edit)
    assert len(found) == 4


def test_learned_through(blocks: None) -> None:
    """A call under inference mode leaves nothing behind that a learned one can't use."""
    case = projected(masked("cross", "none"))
    k, v = random(2, 5, 8), random(2, 5, 8, seed=1)
    with torch.inference_mode():
        call = case.call()
        call.add(range(5), k, v)
        plan.evaluate(call)
    leaf = case.q.clone().requires_grad_()
    call = Case("cross", leaf, case.k, case.v, case.scale).call()
    call.add(range(5), k, v)
    (got,) = torch.autograd.grad(plan.evaluate(call)[0].square().sum(), leaf)
    explicit = Case("cross", leaf, case.k, case.v, case.scale).explicit()
    explicit.add(tuple(range(5)), k, v)
    (want,) = torch.autograd.grad(explicit.output().square().sum(), leaf)
    close(got, want, 10 * EXACT)
