"""Every verb, alone and with others, against explicit matrices: float64, 1e-10."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.call import AttentionCall
from hookctl.attention.token_map import Routing
from hookctl.errors import InputError, UnsupportedError
from hookctl.evaluate import plan
from tests.hookctl.attention.calls import IMAGE, KINDS, TEXT, Case, close, make, random
from tests.hookctl.evaluate.verbs import (
    BACKENDS,
    EXACT,
    MASKS,
    PAIRED,
    check,
    masked,
    permutation,
    scripts,
    softmax,
)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_verb(kind: str, mask: str) -> None:
    case = masked(kind, mask)
    for script in scripts(case).values():
        check(case, script)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sub_batches(kind: str) -> None:
    """Video: a row has several frames; tensors may be given for all frames or for each."""
    case = masked(kind, "bool", sub=3)
    for script in scripts(case).values():
        check(case, script)
    k, v = random(3, 2, 5, 8, seed=40), random(3, 2, 5, 8, seed=41)
    check(case, lambda c: c.extend(3, k, v), lambda c: c.add(4, k, v))
    check(case, lambda c: c.replace((3, 4), q=random(*case.q.shape[1:], seed=42)))


def stage(name: str) -> str:
    """Verbs of one stage and row whose order matters are not tried in every order."""
    return name.split()[0]


ORDERED = ("borrow", "replace", "route", "probabilities", "skip")
SHARED = ({"skip", "probabilities"}, {"borrow", "replace"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:3])
def test_pairs_in_either_order(kind: str) -> None:
    """Verbs of different stages, and additive verbs of one stage, commute."""
    case = make(kind)
    verbs = {name: script for name, script in scripts(case).items() if name in PAIRED}
    for a, b in itertools.combinations(verbs, 2):
        want = check(case, verbs[a], verbs[b], maps=False)
        same_stage = stage(a) == stage(b) or {stage(a), stage(b)} in SHARED
        if not same_stage or stage(a) not in ORDERED:
            call = case.call()
            verbs[b](call)
            verbs[a](call)
            close(plan.evaluate(call)[0], want, EXACT, f"{b}, then {a}")


def test_triples_in_any_order() -> None:
    """Three verbs of different stages: every order gives the same output as explicit matrices."""
    picks = [
        ("borrow kv where", "route blend", "add masked"),
        ("borrow qk (P2P)", "extend row shifted", "restrict"),
        ("extend tensors", "route refine", "bias rank 3"),
        ("restrict twice", "route twice", "add twice"),
        ("extend twice", "route replace", "probabilities"),
        ("borrow v", "bias keys", "route itself"),
        ("replace qk (AdaIN)", "extend row shifted", "restrict"),
        ("replace v", "route blend", "add masked"),
        ("borrow kv where", "extend row", "route one word"),
        ("borrow kv where", "restrict", "skip"),
        ("extend twice", "add", "skip"),
        ("borrow twice", "route image", "extend twice"),
        ("restrict", "route image, all", "add masked"),
    ]
    for kind, mask in (("cross", "bool"), ("self", "none"), ("text_image", "additive")):
        case = masked(kind, mask)
        verbs = scripts(case)
        for names in picks:
            if all(name in verbs for name in names):
                want = check(case, *(verbs[name] for name in names), maps=False)
                for order in itertools.permutations(names):
                    call = case.call()
                    for name in order:
                        verbs[name](call)
                    close(plan.evaluate(call)[0], want, EXACT, ", then ".join(order))


def test_list_order_inside_a_stage() -> None:
    """Of two substitutions or token maps of a row the later one has the last word."""
    case = make("cross")
    swap, gain = permutation(TEXT), random(TEXT, seed=3)
    first, second = case.explicit(), case.explicit()
    for explicit, order in ((first, (0, 1)), (second, (1, 0))):
        verbs = [lambda c: c.route(3, 2, token_map=swap), lambda c: c.route(3, None, gain=gain)]
        for i in order:
            verbs[i](explicit)
    assert not torch.allclose(first.output(), second.output())
    # Replace, then reweight: A' = (A_s T) * gain, the gains of the edit's own words.
    a = torch.softmax(case.q[2] @ case.k[2].mT * case.scale, -1)
    close(first.output()[3], (a @ swap * gain) @ case.v[3], EXACT)
    check(case, lambda c: c.route(3, 2, token_map=swap), lambda c: c.route(3, None, gain=gain))
    check(case, lambda c: c.route(3, None, gain=gain), lambda c: c.route(3, 2, token_map=swap))
    check(case, lambda c: c.borrow(3, k=2), lambda c: c.borrow(3, k=4))
    check(case, lambda c: c.borrow(3, k=4), lambda c: c.borrow(3, k=2))


def test_skip_then_probabilities() -> None:
    case = make("self")
    double = lambda p: p * 2  # noqa: E731
    for first, want in (("skip", 2 * case.v[3]), ("probabilities", case.v[3])):
        call = case.call()
        for verb in (first, *({"skip", "probabilities"} - {first})):
            call.skip(3) if verb == "skip" else call.probabilities(3, double)
        close(plan.evaluate(call)[0][3], want, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_formulas(backend: str) -> None:
    """The papers' own lines, written out."""
    case = make("cross")
    q, k, v, s = case.q, case.k, case.v, case.scale
    t, al, eq = permutation(TEXT), torch.tensor([1.0, 1, 0, 1, 0, 1]).double(), random(TEXT, seed=6)
    alpha = torch.tensor([1.0, 1, 1, 0, 0, 1]).double()
    a_s, a_e = softmax(q[2], k[2], s), softmax(q[3], k[3], s)
    # Prompt-to-Prompt: refinement, then the equaliser, while the word's own window lasts.
    edited = ((a_s @ t) * al + a_e * (1 - al)) * (eq * alpha) + a_e * (1 - alpha)
    moved, kept = t * (al * eq * alpha), (1 - al) * eq * alpha + (1 - alpha)
    call = case.call()
    call.route_by(3, 2, Routing(moved, kept))
    close(plan.evaluate(call, backend)[0][3], edited @ v[3], EXACT, "Prompt-to-Prompt")

    case = make("self")
    q, k, v, s = case.q, case.k, case.v, case.scale
    foreground = (random(IMAGE, seed=7) > 0).double()
    call = case.call()
    call.borrow(3, k=2, v=2, where=foreground)
    m = foreground[:, None]
    masactrl = softmax(q[3], k[2], s) @ v[2] * m + softmax(q[3], k[3], s) @ v[3] * (1 - m)
    close(plan.evaluate(call, backend)[0][3], masactrl, EXACT, "MasaCtrl")

    call = case.call()
    call.extend((3, 4), 2, 2, shift=torch.tensor(2.0).log())
    scores = torch.cat([q[3] @ k[3].mT * s, q[3] @ k[2].mT * s + torch.tensor(2.0).log()], -1)
    shared = scores.softmax(-1) @ torch.cat([v[3], v[2]], -2)
    close(plan.evaluate(call, backend)[0][3], shared, EXACT, "StyleAligned")

    lse = torch.stack([x.logsumexp(-1) for x in scores.split(IMAGE, -1)])
    w = torch.sigmoid(lse[0] - lse[1])[..., None]
    parts = softmax(q[3], k[3], s) @ v[3], softmax(q[3], k[2], s) @ v[2]
    close(shared, w * parts[0] + (1 - w) * parts[1], EXACT, "extension by log-sum-exp")

    call = case.call()
    call.skip(3)
    close(plan.evaluate(call, backend)[0][3], v[3], EXACT, "PAG")


@pytest.mark.parametrize("kind", KINDS)
def test_learned_through_after_inference(kind: str) -> None:
    """What is kept of a call in inference mode serves a call whose gradient is wanted."""
    case = make(kind)
    for script in scripts(case).values():
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        with torch.inference_mode():
            call = case.call()
            script(call)
            want = plan.evaluate(call)[0]
        call = replace(case, **dict(zip("qkv", leaves, strict=True))).call()
        script(call)
        out = plan.evaluate(call)[0]
        assert torch.equal(out, want)
        out.sum().backward()


def test_video_rows_of_several_edits() -> None:
    """Three edits of one source, each with its own map, in one call."""
    case = make("cross", sub=2)
    dense = [random(TEXT, TEXT, seed=s).softmax(0) for s in range(3)]
    check(
        case,
        lambda c: c.route(3, 2, token_map=dense[0]),
        lambda c: c.route(4, 2, token_map=dense[1], blend=0.5),
        lambda c: c.route(1, 0, token_map=permutation(TEXT), gain=2.0),
    )
    call = case.call()
    call.route((3, 4), 2, gain=2.0)
    assert isinstance(call, AttentionCall)
    out = plan.evaluate(call)[0]
    close(out[3], 2 * softmax(case.q[2], case.k[2], case.scale) @ case.v[3], EXACT)
    close(out[4], 2 * softmax(case.q[2], case.k[2], case.scale) @ case.v[4], EXACT)


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="backend='cuda'; give one of auto, triton"):
        plan.check_backend("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="backend='triton': the kernels need a CUDA or ROCm"):
        plan.check_backend("triton")
    for backend in ("auto", "sdpa", "reference"):
        plan.check_backend(backend)
        call = make("cross").call()
        call.route(3, 2, gain=2.0)
        assert plan.evaluate(call, backend)[1].name in (backend, "short keys")
    call = make("cross").call()
    call.probabilities(3, lambda p: p)
    assert plan.evaluate(call)[1].name == "matrix"
    assert TEXT == call.k.shape[-2]


# -- bits ------------------------------------------------------------------------------------------


def plain(case: Case) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (case.q, case.k, case.v))
    return F.scaled_dot_product_attention(q, k, v, scale=case.scale).unflatten(0, (5, -1))


@pytest.mark.parametrize("kind", ("cross", "self"))
def test_reading_changes_nothing(kind: str) -> None:
    """A read alone notes no operation; and beside edits it leaves their output bit-identical."""
    case = make(kind)
    call = case.call()
    maps: list[Tensor] = []
    call.read((2, 3), [0, 1], lambda row, p: maps.append(p))
    assert not call.operations
    plan.read_only(call)
    assert len(maps) == 2 and maps[0].shape == (1, IMAGE, 2)
    assert torch.equal(plan.evaluate(call)[0], plain(case))
    outs = []
    for read in (False, True):
        call = case.call()
        call.borrow(3, k=2)
        if read:
            call.read(3, [0], lambda row, p: None)
        outs.append(plan.evaluate(call)[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_untouched_rows_keep_their_bits(dtype: torch.dtype) -> None:
    case = make("self", sub=2)
    case.q, case.k, case.v = (x.to(dtype) for x in (case.q, case.k, case.v))
    call = case.call()
    call.borrow((1, 3), q=2, k=2)
    call.replace(3, v=2 * call.v[3])
    out, chosen = plan.evaluate(call)
    assert chosen.name == "sdpa"
    assert torch.equal(out[[0, 2, 4]], plain(case)[[0, 2, 4]])


def test_same_as_the_source() -> None:
    """A row that is the source's copy, edited by the source, is the source."""
    case = make("cross")
    for x in (case.q, case.k, case.v):
        x[3] = x[2]
    call = case.call()
    call.route(3, 2, token_map=torch.eye(TEXT))
    call.borrow(3, q=2, k=2)
    out = plan.evaluate(call)[0]
    assert torch.equal(out[3], out[2])
