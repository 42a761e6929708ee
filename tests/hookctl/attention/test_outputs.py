"""Outputs of several terms: combined by weights of their own making, and read."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import COND, Editor
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError
from hookctl.evaluate import plan, triton
from hookctl.loop.prompts import encode
from tests import zoo
from tests.families.subjects import error
from tests.hookctl.attention.calls import IMAGE, KINDS, TEXT, Case, Script, close, make, random
from tests.hookctl.attention.explicit import softmax
from tests.hookctl.evaluate.test_triton import exact, in_singles
from tests.hookctl.evaluate.verbs import BACKENDS, EXACT, masked, scripts
from tests.recipes.runs import TWO

K, V = random(2, 5, 8, seed=40), random(2, 5, 8, seed=41)
SHIFT = torch.tensor([0.0, 0.4, -torch.inf, 0.0, -1.0], dtype=torch.float64)


def by_size(outputs: dict[str, Tensor]) -> dict[str, Tensor | float]:
    """Weights that depend on the outputs: of each query, of each of its heads, and a number."""
    of_query = outputs["given"].square().sum(-1).mean(1)
    return {"own": 1 + of_query, "other": outputs["own"].sum(-1).sigmoid(), "given": -0.7}


def ask(call: Any) -> None:
    shifts = {"given": SHIFT.to(call.q.dtype)}
    given = tuple(x.to(call.q) for x in (K, V))
    call.outputs((3, 4), {"other": 2, "given": given}, by_size, shifts=shifts)


def wanted(case: Case, *chosen: Script) -> Tensor:
    """The same by explicit matrices."""
    explicit = case.explicit()
    for script in chosen:
        script(explicit)
    out = explicit.output().clone()
    start, stop = case.call().spans.image_queries
    for row in (3, 4):
        q = case.q[row]
        other = softmax(q @ case.k[2].mT * case.scale + explicit.mask[2]) @ case.v[2]
        given = softmax(q @ K.mT * case.scale + SHIFT) @ V
        parts = {"own": out[row], "other": other, "given": given}
        parts = {name: part[..., start:stop, :] for name, part in parts.items()}
        n = 1 + parts["given"].square().sum(-1).mean(1)
        h = parts["own"].sum(-1).sigmoid()
        made = parts["own"] * n[:, None, :, None] + parts["other"] * h[..., None]
        out[row][..., start:stop, :] = made - 0.7 * parts["given"]
    return out


@pytest.mark.parametrize("mask", ["none", "bool", "per head", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_matrices(kind: str, mask: str) -> None:
    """Alone and over what each other verb made of the row, whoever speaks first."""
    case = masked(kind, mask, sub=2)
    known = scripts(case)
    for name in (None, "borrow kv where", "restrict", "route blend", "add masked", "probabilities"):
        chosen = [] if name is None else [known[name]]
        want = wanted(case, *chosen)
        for backend in BACKENDS:
            call = case.call()
            ask(call)
            for script in chosen:
                script(call)
            out, used = plan.evaluate(call, backend)
            close(out, want, EXACT, f"{name} by {backend}")
            assert used.name != "pass-through"


@pytest.mark.skipif(triton.missing() is not None, reason="neither a device nor the interpreter")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cross", "text_image"])
def test_by_the_kernel(kind: str) -> None:
    case = make(kind, heads=2)
    single = in_singles(case)
    call = single.call()
    ask(call)
    out, used = plan.evaluate(call, "triton")
    assert used.name == "triton"
    close(out.cpu(), wanted(exact(single)), 1e-5)


def test_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookctl.evaluate import reference

    monkeypatch.setattr(reference, "matrices", None)
    for kind in KINDS:
        call = make(kind).call()
        ask(call)
        plan.evaluate(call, "sdpa")


def _grown(factor: float, outputs: dict[str, Tensor]) -> dict[str, Tensor | float]:
    return {"own": factor, "other": outputs["own"].mean((1, 3))}


def test_one_after_another_and_gradients() -> None:
    case = make("self")
    case.q.requires_grad_()
    call = case.call()
    for factor in (2.0, 3.0):
        call.outputs(3, {"other": 2}, partial(_grown, factor))
    out, _ = plan.evaluate(call)
    own, other = (torch.softmax(case.q[3] @ case.k[r].mT * 0.5, -1) @ case.v[r] for r in (3, 2))
    for factor in (2.0, 3.0):
        own = factor * own + own.mean((1, 3))[:, None, :, None] * other
    close(out[3], own, EXACT)
    got, want = (torch.autograd.grad(x.square().sum(), case.q)[0] for x in (out[3], own))
    close(got, want, EXACT, "gradient")


def test_text_queries_keep_to_themselves() -> None:
    for kind in KINDS[2:]:
        call, plain = make(kind).call(), make(kind).explicit().output()
        call.outputs(3, {"other": 2}, lambda outputs: {"other": 1.0})
        out, _ = plan.evaluate(call)
        start, stop = call.spans.image_queries
        assert start in (0, TEXT) and stop - start == IMAGE
        rest = [i for i in range(IMAGE + TEXT) if not start <= i < stop]
        close(out[3][..., rest, :], plain[3][..., rest, :], EXACT)
        close(out[:3], plain[:3], EXACT)


def test_bad_input() -> None:
    call = make("cross").call()
    for parts, shifts, match in (
        ({}, {}, "at least one part"),
        ({"own": 2}, {}, "none of them 'own'"),
        ({"a": 2}, {"b": SHIFT}, "shifts of parts alone"),
        ({"a": 9}, {}, "row 9 is not in this call"),
        ({"a": "nowhere"}, {}, "context 'nowhere' is not in this call"),
        ({"a": (K, V[:, 1:])}, {}, "as many"),
        ({"a": (K, V)}, {"a": SHIFT[1:]}, r"the shift of 'a' is \(4,\); its text has 5"),
        ({"a": 2}, {"a": SHIFT}, "a row with a mask of its own"),
    ):
        with pytest.raises(InputError, match=match):
            call.outputs(3, parts, by_size, shifts=shifts)
    answers: list[tuple[Any, str]] = [
        (None, "weigh returned .*NoneType.*names own, a"),
        ({"b": 1.0}, "return weights by the names own, a"),
        ({"a": torch.ones(3)}, rf"weight of 'a' is \(3,\).*give a number, \[{IMAGE}\]"),
    ]
    for found, match in answers:
        call = make("cross").call()
        call.outputs(3, {"a": 2}, partial(_answer, found))
        with pytest.raises(InputError, match=match):
            plan.evaluate(call)


def _answer(found: Any, outputs: dict[str, Tensor]) -> Any:
    return found


# -- in a run ------------------------------------------------------------------------------------


class Further(Editor):
    """Gives a further text."""

    sites = "cross, joint"

    def begin(self, state: Any) -> None:
        self.text = encode(state.pipe, ["a green bird"], state.encoding).sequence

    def context(self, state: Any) -> dict[str, Tensor]:
        return {"bird": self.text}


class Half(Further):
    """Half of the prompt's output and half of the further text's, where they are alike."""

    def __init__(self, share: float) -> None:
        self.share = share

    def attention(self, call: AttentionCall) -> None:
        rows = call.rows.where(branch=COND)
        weights = {"own": 1 - self.share, "bird": self.share}
        call.outputs(rows, {"bird": "bird"}, lambda outputs: weights)


class Divided(Further):
    def attention(self, call: AttentionCall) -> None:
        start, stop = call.spans.image_queries
        halves = hookctl.Division({"bird": torch.full((stop - start,), 0.5)})
        call.divide(call.rows.where(branch=COND), halves)


@pytest.mark.slow  # three runs of each
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "pixart", "wan"])
def test_a_constant_share_is_a_division(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    found = []
    for editor in (Half(0.5), Divided(), Half(0.0)):
        with hookctl.control(pipe, editor) as session:
            found.append(case.run(pipe, TWO))
            assert "never acted" not in session.report()
    assert error(found[0], found[1]) < 1e-5
    assert error(found[0], found[2]) > 1e-4
    assert error(found[2], case.run(pipe, TWO)) < 1e-5


class Read(Further):
    """Reads the outputs of the image and of the further text; edits nothing."""

    def __init__(self, text: str | None) -> None:
        self.text_name = text
        self.seen: dict[tuple[str, int, int], Tensor] = {}

    def attention(self, call: AttentionCall) -> None:
        path = call.site.path, call.clock.step

        def into(row: Any, outputs: Tensor) -> None:
            self.seen[(*path, row.index)] = outputs

        call.read_outputs(call.rows.where(branch=COND), into, text=self.text_name)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_outputs_are_what_the_next_layer_is_given(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, TWO)
    seen: dict[str, list[Tensor]] = {}

    def note(path: str) -> Any:
        return lambda module, args: seen.setdefault(path, []).append(args[0])

    model = pipe.unet if name == "sd15" else pipe.transformer
    handles = [
        module.to_out[0].register_forward_pre_hook(note(path))
        for path, module in model.named_modules()
        if getattr(module, "to_out", None) is not None
    ]
    reader = Read(None)
    with hookctl.control(pipe, reader) as session:
        out = case.run(pipe, TWO)
    for handle in handles:
        handle.remove()
    assert error(out, plain) < 1e-5
    assert "read" in session.report()
    looked = 0
    for (path, step, row), outputs in reader.seen.items():
        if path in seen:
            whole = seen[path][step]
            image = whole[row][: outputs.shape[-2]]
            assert error(outputs[0], image) < 1e-6
            looked += 1
    assert looked


def test_outputs_of_a_text() -> None:
    """Its tokens ask the image and each other, at joint sites alone."""
    case = zoo.PIPELINES["sd3"]
    pipe, reader = case.make(), Read("bird")
    with hookctl.control(pipe, reader):
        case.run(pipe, TWO)
    tokens = {outputs.shape[-2] for outputs in reader.seen.values()}
    assert tokens == {reader.text.shape[1]}
    unet = zoo.PIPELINES["sd15"].make()
    with hookctl.control(unet, Read("bird")):
        with pytest.raises(UnsupportedError, match="'bird' has no queries at .* no joint site"):
            zoo.PIPELINES["sd15"].run(unet, TWO)
