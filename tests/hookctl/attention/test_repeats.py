"""Calls like earlier ones are played from a tape, and nobody can tell by the numbers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hookctl.attention import plan, tape
from hookctl.attention.repeats import Repeats
from tests.hookctl.attention.calls import KINDS, Case, Script, make, random
from tests.hookctl.attention.test_algebra import masked, scripts

Found = tuple[Tensor, plan.Plan, dict[int, Tensor]]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tape.Tape]]:
    """Each playing of a tape."""
    play, seen = tape.Tape.play, []

    def spied(self: tape.Tape, given: Any) -> list[Tensor]:
        seen.append(self)
        return play(self, given)

    monkeypatch.setattr(tape.Tape, "play", spied)
    return seen


def evaluated(case: Case, script: Script, backend: str, repeats: Repeats | None = None) -> Found:
    call, seen = case.call(), {}
    script(call)
    call.read((2, 3), [0, 2], lambda row, p: seen.update({row.index: p}))
    return *plan.evaluate(call, backend, repeats), seen


def check(case: Case, script: Script, backend: str, repeats: Repeats, name: str = "") -> None:
    """Some calls of the same form give the bits that each of them gives alone."""
    for turn in range(5):
        if turn == 4:
            change_tensors(script)
        other = make(case.kind, sub=case.q.shape[1], heads=case.q.shape[2], seed=10 * turn)
        dtype, mask = case.q.dtype, case.mask
        if mask is not None and mask.is_floating_point():
            mask = (mask * (turn + 1)).to(dtype)
        q, k, v = (x.to(dtype) for x in (other.q, other.k, other.v))
        other = Case(case.kind, q, k, v, case.scale, mask)
        got = evaluated(other, script, backend, repeats)
        want = evaluated(other, script, backend)
        assert torch.equal(got[0], want[0]) and got[0].stride() == want[0].stride(), name
        assert got[1] == want[1] and got[2].keys() == want[2].keys(), name
        assert all(torch.equal(got[2][row], want[2][row]) for row in want[2]), name


def keys_and_values(c: Any) -> None:
    c.borrow(3, k=2, v=2)


def proven(script: Script, backend: str) -> Repeats:
    """After as many calls as it takes to play the next ones."""
    repeats = Repeats()
    for seed in range(4):
        evaluated(make("self", seed=seed), script, backend, repeats)
    return repeats


def change_tensors(script: Script) -> None:
    """Every tensor that an editor holds: what was made of them before a tape is made must not be
    played."""
    held = [cell.cell_contents for cell in script.__closure__ or ()]
    for x in tree_leaves(held):
        if isinstance(x, Tensor):
            x.copy_(x * 0.5 if x.is_floating_point() else x.roll(1))


ONCE = ("probabilities",)  # a function of its own, which may do anything


@pytest.mark.parametrize("mask", ("none", "bool", "additive"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_verb(kind: str, mask: str, played: list[tape.Tape]) -> None:
    case = masked(kind, mask)
    for backend in ("auto", "sdpa", "reference"):
        repeats = Repeats()
        for name, script in scripts(case).items():
            played.clear()
            check(case, script, backend, repeats, f"{backend}: {name}")
            least = 0 if name in ONCE else 2
            assert least <= len(played) <= least + 1, f"{backend}: {name}"


@pytest.mark.slow
def test_verbs_by_kernels(played: list[tape.Tape]) -> None:
    case = masked("cross", "none", heads=1)
    case.q, case.k, case.v = case.q.float(), case.k.float(), case.v.float()
    repeats, known = Repeats(), scripts(case)
    for name in ("borrow qk (P2P)", "extend by a share", "restrict", "bias twice", "route blend"):
        played.clear()
        check(case, known[name], "triton", repeats, name)
        assert len(played) >= 2, name


def read(case: Case, repeats: Repeats | None) -> list[Tensor]:
    call, found = case.call(), list[Tensor]()
    call.read((2, 3), [0, 2], lambda row, p: found.append(p))
    call.marginals(1, lambda row, sums: found.append(sums))
    plan.read_only(call, repeats=repeats)
    assert len(found) == 3
    return found


def test_read_outs_alone(played: list[tape.Tape]) -> None:
    repeats = Repeats()
    for turn in range(4):
        case = make("self", seed=10 * turn)
        assert all(map(torch.equal, read(case, repeats), read(case, None)))
    assert len(played) == 2


def test_forms_are_told_apart(played: list[tape.Tape]) -> None:
    """What a tape has no place for makes another form; tensors that change do not."""
    repeats, weight, number = Repeats(), random(12, seed=3).sigmoid(), [1.0]
    gain = random(12, seed=4).sigmoid()
    edits: list[Script] = [
        lambda c: c.borrow(3, q=2, k=2),
        lambda c: c.borrow(4, q=2, k=2),
        lambda c: c.borrow(3, q=1, k=1),
        lambda c: c.borrow(3, k=2),
        lambda c: c.borrow(3, k=2, where=weight),
        lambda c: c.bias(3, key_factors=number[0] * weight),
        lambda c: c.add(3, c.k[2], c.v[2], scale=number[0]),
        lambda c: c.extend(3, 2, 2, shift=number[0]),
        lambda c: c.route(3, 2, gain=gain),
        lambda c: c.skip(3),
    ]

    def check_all(seed: int) -> int:
        case, before = make("self", seed=seed), len(played)
        for edit in edits:
            out = evaluated(case, edit, "auto", repeats)[0]
            assert torch.equal(out, evaluated(case, edit, "auto")[0])
        return len(played) - before

    assert [check_all(seed) for seed in range(4)] == [0, 0, len(edits), len(edits)]
    weight *= 0.5
    assert check_all(4) == len(edits)
    number[0] = 0.25
    assert check_all(5) == len(edits) - 2
    gain *= 0.5  # tables were made of its values
    assert check_all(6) == len(edits) - 3  # the others have been seen once


@pytest.mark.parametrize("change", ("dtype", "shape", "stride", "scale", "mask", "learned"))
def test_tensors_of_another_form(change: str, played: list[tape.Tape]) -> None:
    repeats = proven(keys_and_values, "auto")
    assert len(played) == 2
    case = make("self", sub=2) if change == "shape" else make("self", seed=5)
    if change == "dtype":
        case.q, case.k, case.v = case.q.float(), case.k.float(), case.v.float()
    if change == "stride":
        case.q = case.q.mT.contiguous().mT
    if change == "scale":
        case.scale *= 2
    if change == "mask":
        case.mask = masked("self", "bool").mask
    if change == "learned":
        case.q.requires_grad_()
    got, want = (evaluated(case, keys_and_values, "auto", r)[0] for r in (repeats, None))
    assert torch.equal(got, want) and got.requires_grad == want.requires_grad
    assert len(played) == 2


@pytest.mark.parametrize("learned", ("queries", "weight", "gain"))
def test_what_is_learned_is_never_played(learned: str, played: list[tape.Tape]) -> None:
    """Checkpointing counts what is saved for a backward pass, and has it made once more."""
    repeats = Repeats()

    def script(c: Any) -> None:
        c.borrow(3, k=2, v=2, where=weight)
        c.route(3, 2, gain=gain)

    for seed in range(5):
        case, weight, gain = make("self", seed=seed), random(12).sigmoid(), random(12).exp()
        leaf = {"queries": case.q, "weight": weight, "gain": gain}[learned].requires_grad_()
        grads = []
        for r in (repeats, None):
            out, _, maps = evaluated(case, script, "auto", r)
            grads.append(torch.autograd.grad(out.square().sum() + maps[3].sum(), leaf)[0])
        assert torch.equal(*grads) and grads[0].any()
    assert not played


def test_made_in_inference_mode(played: list[tape.Tape]) -> None:
    repeats, weight = Repeats(), random(12, seed=3).sigmoid()
    with torch.inference_mode():
        gain = random(12, seed=4).exp()
    for seed in range(10):
        with torch.inference_mode(seed % 2 == 0):
            check_one(make("self", seed=seed), lambda c: c.borrow(3, k=2, where=weight), repeats)
            check_one(make("self", seed=seed), lambda c: c.route(3, 2, gain=gain), repeats)
    assert len(played) == 6  # inference tensors don't tell whether they were changed


def check_one(case: Case, script: Script, repeats: Repeats) -> None:
    out = evaluated(case, script, "auto", repeats)[0]
    assert torch.equal(out, evaluated(case, script, "auto")[0])


def test_what_is_not_proven_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape that gives other bits than the plain way, at its only trial."""
    plays = []

    def wrong(self: tape.Tape, given: Any) -> list[Tensor]:
        plays.append(self)
        return [x + 1e-9 for x in play(self, given)]

    play = tape.Tape.play
    monkeypatch.setattr(tape.Tape, "play", wrong)
    check(make("self"), keys_and_values, "auto", Repeats())
    assert len(plays) == 1


def test_choices_by_values_are_evaluated_anew(
    monkeypatch: pytest.MonkeyPatch, played: list[tape.Tape]
) -> None:
    evaluate = plan.sdpa.evaluate

    def looking(finished: Any, rows: Any) -> Any:
        assert finished.terms[3][0].own.k.base.sum().item() != 0
        return evaluate(finished, rows)

    last = plan.EVALUATORS[-1]
    looked = type(last)(last.name, last.missing, last.suits, looking)
    monkeypatch.setattr(plan, "EVALUATORS", (*plan.EVALUATORS[:-1], looked))
    check(make("self"), keys_and_values, "auto", Repeats())
    assert not played


def test_who_observes_sees_the_plain_calls(played: list[tape.Tape]) -> None:
    """Counters of operations, transforms of functions, forward-mode gradients."""
    repeats = proven(keys_and_values, "reference")
    assert len(played) == 2
    flops = []
    for r in (repeats, None):
        with FlopCounterMode(display=False) as counter:
            evaluated(make("self"), keys_and_values, "reference", r)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    case = make("self")

    def of_queries(q: Tensor, r: Repeats | None) -> Tensor:
        other = Case("self", q, case.k, case.v, case.scale)
        return evaluated(other, keys_and_values, "reference", r)[0]

    for r in (repeats, None):
        torch.func.vjp(lambda q, r=r: of_queries(q, r), case.q)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode gradients
            torch.func.jvp(lambda q, r=r: of_queries(q, r), (case.q,), (case.q,))
    assert len(played) == 2


def test_tensors_without_numbers(played: list[tape.Tape]) -> None:
    repeats, case = Repeats(), make("self")
    case.q, case.k, case.v = (x.to("meta") for x in (case.q, case.k, case.v))
    for _ in range(4):
        out = evaluated(case, keys_and_values, "auto", repeats)[0]
        assert out.device.type == "meta" and out.shape == case.q.shape
    assert not played


@pytest.mark.parametrize("backend", ("sdpa", pytest.param("triton", marks=pytest.mark.slow)))
def test_nothing_of_a_call_is_kept(backend: str, played: list[tape.Tape]) -> None:
    """Neither by tapes, nor by launches made ready for further calls of their form."""
    repeats, alive = Repeats(), []
    for edit in ("borrow kv (MasaCtrl)", "borrow qk (P2P)", "restrict", "bias rank 3"):
        played.clear()
        for seed in range(4):
            case = make("self", heads=1, seed=seed)
            case.q, case.k, case.v = case.q.float(), case.k.float(), case.v.float()
            out, _, maps = evaluated(case, scripts(case)[edit], backend, repeats)
            alive += [weakref.ref(x) for x in (case.q, case.k, case.v, out, *maps.values())]
            del case, out, maps
        assert len(played) == (0 if edit == "restrict" else 2), edit
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_forms_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor that gives other numbers at each call fills no memory."""
    monkeypatch.setattr("hookctl.attention.repeats._KEPT", 4)
    repeats, case = Repeats(), make("self")
    for n in range(12):
        evaluated(case, lambda c, n=n: c.extend(3, 2, 2, shift=float(n)), "auto", repeats)
    assert len(repeats._known) == 4
