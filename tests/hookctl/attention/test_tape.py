"""Recorded torch calls, played on other tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hookctl.attention.tape import Recorder, Tape, unrecorded
from tests.hookctl.attention.calls import random

CONSTANT = random(4, 4, seed=9)


def recorded(fn: Callable[..., list[Tensor]], *given: Tensor) -> Tape | None:
    recorder = Recorder(given)
    with recorder:
        made = fn(*given)
    return recorder.tape(made)


def in_place(x: Tensor) -> list[Tensor]:
    out = torch.zeros(2, 4, dtype=x.dtype)
    out[0] = x[1]
    out[1].add_(x.mean(0), alpha=3)
    torch.mul(out, 2, out=out)
    return [out]


PROGRAMS: dict[str, Callable[..., list[Tensor]]] = {
    "operators": lambda x: [x @ CONSTANT + 1, 2 - x],
    "arguments by name": lambda x: [x.softmax(dim=-1).sum(1, keepdim=True)],
    "lists": lambda x: [torch.cat([x, torch.stack((x[0], CONSTANT[0]))])],
    "several results": lambda x: [x.unbind(1)[2], *x.split(2)],
    "form": lambda x: [x * x.shape[0] + len(x) + x.dim()],
    "written in place": in_place,
    "what was given": lambda x: [x],
    "a constant": lambda x: [CONSTANT],
    "what is asked of no tensor": lambda x: [x.to(torch.device("cpu")) * torch.get_num_threads()],
    "made inside": lambda x: [x + torch.ones(4, dtype=x.dtype)],
    "nothing": lambda x: [],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_bits(name: str) -> None:
    program = PROGRAMS[name]
    tape = recorded(program, random(4, 4))
    assert tape is not None
    for seed in (1, 2, 1):
        x = random(4, 4, seed=seed)
        for got, want in zip(tape.play([x]), program(x.clone()), strict=True):
            assert torch.equal(got, want) and got.stride() == want.stride()


class Spy(TorchFunctionMode):
    """The functions that are called, and how many of their results are alive after each."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []
        self.alive: list[int] = []
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.called.append(func)
        self._made.append(weakref.ref(out))
        self.alive.append(sum(ref() is not None for ref in self._made))
        return out


def test_what_nobody_uses_is_not_played() -> None:
    def program(x: Tensor) -> list[Tensor]:
        x.exp().sin()
        return [x.cos()]

    x = random(4, 4)
    tape = recorded(program, x)
    assert tape is not None
    with Spy() as spy:
        tape.play([x])
    assert spy.called == [Tensor.cos]


def test_choices_by_values_are_refused() -> None:
    """The numbers of another tensor might have chosen otherwise."""
    x = random(4, 4)
    assert recorded(lambda x: [x if x.sum() > 0 else -x], x) is None
    assert recorded(lambda x: [x * x.sum().item()], x) is None
    assert recorded(lambda x: [x + (1 if torch.equal(x, CONSTANT) else 0)], x) is None
    assert recorded(lambda x: [x * max(x[0].tolist())], x) is None


def test_what_is_made_unrecorded_is_a_constant() -> None:
    made: list[Tensor] = []

    def program(x: Tensor) -> list[Tensor]:
        with unrecorded():
            made.append(torch.arange(4).to(x))
        return [x + made[-1]]

    tape = recorded(program, random(4, 4))
    assert tape is not None
    made[0] += 1  # what was made is what is played with
    x = random(4, 4, seed=1)
    assert torch.equal(tape.play([x])[0], x + made[0]) and len(made) == 1
    with unrecorded():  # does nothing where nobody records
        assert torch.equal(tape.play([x])[0], x + made[0])


def test_nothing_is_kept_alive() -> None:
    """Neither what it was recorded with, nor, while it plays, what no later step needs."""
    made: list[weakref.ref[Tensor]] = []

    def program(x: Tensor) -> list[Tensor]:
        for _ in range(5):
            x = x.exp()
            made.append(weakref.ref(x))
        return [x]

    x = random(4, 4)
    tape = recorded(program, x)
    assert tape is not None
    made.append(weakref.ref(x))
    del x
    gc.collect()
    assert not any(ref() is not None for ref in made)
    x = random(4, 4)
    with Spy() as spy:
        tape.play([x])
    assert spy.called == [Tensor.exp] * 5 and max(spy.alive) == 2


def test_gradients_flow_through() -> None:
    def program(x: Tensor) -> list[Tensor]:
        return [(x @ CONSTANT).softmax(-1).square()]

    tape = recorded(program, random(4, 4).requires_grad_())
    assert tape is not None
    x = random(4, 4, seed=1).requires_grad_()
    (want,) = torch.autograd.grad(program(x)[0].sum(), x)
    (got,) = torch.autograd.grad(tape.play([x])[0].sum(), x)
    assert torch.equal(got, want)
