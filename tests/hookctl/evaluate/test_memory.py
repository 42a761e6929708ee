"""No N x N tensor: every tensor that an edit makes is watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hookctl.attention.call import AttentionCall
from hookctl.evaluate import plan
from tests.hookctl.attention.calls import Case, random

N, HEADS = 1024, 2


class Watch(TorchDispatchMode):
    """The largest storage and the largest view (per row and head) that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operators = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.add(str(func))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                kept = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, x.shape[-2:].numel() if x.dim() > 1 else 0, kept)
        return out


def case() -> Case:
    q, k, v = (random(4, 1, HEADS, N, 40, seed=i, dtype=torch.float32) for i in range(3))
    return Case("self", q, k, v, 40**-0.5)


labels = torch.arange(N) % 4
EDITS: dict[str, Callable[[AttentionCall], Any]] = {
    "self-replacement": lambda c: c.borrow(3, q=2, k=2),
    "MasaCtrl": lambda c: c.borrow(3, k=2, v=2),
    "MasaCtrl, masked": lambda c: c.borrow(3, k=2, v=2, where=random(N).sigmoid()),
    "replace": lambda c: c.replace((1, 3), q=random(2, 1, HEADS, N, 40)),
    "extend": lambda c: c.extend((1, 3), 2, 2, shift=0.5),
    "extend tensors": lambda c: c.extend(3, random(HEADS, 9, 40), random(HEADS, 9, 40)),
    "restrict": lambda c: c.restrict(3, 1 << labels, 3 << labels),
    "restrict, many kinds": lambda c: c.restrict(3, torch.arange(N) + 1, torch.arange(N)),
    "bias": lambda c: c.bias(3, query_factors=random(N, 3), key_factors=random(N, 3, seed=1)),
    "bias of keys": lambda c: c.bias(3, key_factors=random(N)),
    "restrict and bias": lambda c: (
        c.restrict(3, 1 << labels, 3 << labels),
        c.bias(3, query_factors=random(N, 3), key_factors=random(N, 3, seed=1)),
        c.extend(3, 2, 2),
    ),
    "skip": lambda c: c.skip(3),
    "route": lambda c: c.route(3, 2, blend=0.5),
    "add": lambda c: c.add(3, random(HEADS, 9, 40), random(HEADS, 9, 40), scale=0.4),
    "read": lambda c: None,
}


@pytest.mark.parametrize("backend", ("auto", "sdpa"))
@pytest.mark.parametrize("edit", EDITS)
def test_no_matrix(edit: str, backend: str) -> None:
    call = case().call()
    seen: list[Tensor] = []
    call.read((2, 3), range(8), lambda row, p: seen.append(p))
    with Watch() as watch:
        EDITS[edit](call)
        plan.evaluate(call, backend) if call.operations else plan.read_only(call)
    assert len(seen) == 2
    # The largest lawful tensors are all rows of q, k or v; a matrix of one row would be larger.
    assert watch.largest < HEADS * N * N, f"{watch.largest} elements; {sorted(watch.operators)}"


SHORT: dict[str, Callable[[AttentionCall], Any]] = {
    "route": lambda c: c.route(3, 2, blend=0.5),
    "add": lambda c: c.add(3, random(HEADS, 77, 8), random(HEADS, 77, 8), scale=0.4),
    "bias of keys": lambda c: c.bias(3, key_factors=random(77)),
    "read": lambda c: None,
}


@pytest.mark.parametrize("edit", SHORT)
def test_no_matrix_over_a_short_text(edit: str) -> None:
    """Over a short text too, the probabilities of all queries are never there at once."""
    n, m = 4096, 77
    q, k, v = (random(4, 1, HEADS, t, 8, seed=t, dtype=torch.float32) for t in (n, m, m))
    call = Case("cross", q, k, v, 8**-0.5).call()
    seen: list[Tensor] = []
    call.read((2, 3), range(8), lambda row, p: seen.append(p))
    with Watch() as watch:
        SHORT[edit](call)
        plan.evaluate(call) if call.operations else plan.read_only(call)
    assert len(seen) == 2
    assert watch.largest < HEADS * n * m / 2, f"{watch.largest} elements; {sorted(watch.operators)}"


def test_the_watch_sees_a_matrix() -> None:
    call = case().call()
    call.probabilities(3, lambda p: p)
    with Watch() as watch:
        plan.evaluate(call)
    assert watch.largest >= HEADS * N * N
    with Watch() as watch:
        plan.evaluate(call, "reference")
    assert watch.largest >= HEADS * N * N
