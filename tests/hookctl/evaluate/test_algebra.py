"""Every verb, alone and with others, against explicit matrices: float64, 1e-10."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.attention.call import AttentionCall, Routing
from hookctl.evaluate import plan, sdpa
from tests.hookctl.attention.calls import IMAGE, KINDS, TEXT, Case, Script, close, make, random

BACKENDS = ("auto", "sdpa", "reference")
EXACT = 1e-10  # float64
SIGN = -(1 << 63)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sizes(case: Case) -> tuple[int, int]:
    return case.q.shape[-2], case.k.shape[-2]


def text(case: Case) -> int:
    return case.k.shape[-2] if case.kind in ("cross", "self") else TEXT


def bits(n: int, seed: int, kinds: tuple[int, ...]) -> Tensor:
    return torch.tensor(kinds)[random(n, seed=seed).argsort() % len(kinds)]


def permutation(t: int) -> Tensor:
    return torch.eye(t, dtype=torch.float64)[random(t, seed=5).argsort()]


def scripts(case: Case) -> dict[str, Script]:
    """One or more uses of each verb; the edited row is 3 (or several), the source 2."""
    n, m = sizes(case)
    t = text(case)
    heads, d = case.q.shape[2], case.q.shape[-1]
    unit = random(n, seed=11).sigmoid()
    dense = random(t, t, seed=12).softmax(0)
    blend, gain = random(t, seed=13).sigmoid(), random(t, seed=14) * 2
    new = [random(heads, 5, d, seed=s) for s in (15, 16, 17, 18)]
    sub = case.q.shape[1]
    own = [random(2, sub, heads, x, d, seed=s) for x, s in ((n, 26), (m, 27), (m, 28))]
    queries = bits(n, 19, (1, 2, 3, SIGN, 0, SIGN | 2))
    keys = bits(m, 20, (1, 2, SIGN, 5, 0))
    other = (bits(n, 21, (1, 6, 8)), bits(m, 22, (1, 2, 9)))
    factors = (random(n, 3, seed=23), random(m, 3, seed=24))
    of_keys, shifts = factors[1].unbind(1), random(5, seed=25)
    word = torch.zeros(t, dtype=torch.float64)
    word[1:3] = 1
    others, moved = 1 - word, permutation(t)
    found: dict[str, Script] = {
        "borrow q": lambda c: c.borrow(3, q=2),
        "borrow k": lambda c: c.borrow(3, k=2),
        "borrow v": lambda c: c.borrow((3, 4), v=2),
        "borrow qk (P2P)": lambda c: c.borrow((3, 4), q=2, k=2),
        "borrow kv (MasaCtrl)": lambda c: c.borrow(3, k=2, v=2),
        "borrow kv where": lambda c: c.borrow(3, k=2, v=2, where=unit),
        "borrow q where": lambda c: c.borrow(3, q=4, where=unit),
        "borrow twice": lambda c: (c.borrow(3, k=2, v=2, where=unit), c.borrow(3, k=4)),
        "replace qk (AdaIN)": lambda c: c.replace((3, 4), q=own[0], k=own[1]),
        "replace v": lambda c: c.replace((3, 4), v=own[2][0]),
        "replace, borrow": lambda c: (c.replace(3, q=own[0][0]), c.borrow(3, k=2, v=2, where=unit)),
        "borrow, replace": lambda c: (c.borrow(3, k=2, v=2, where=unit), c.replace(3, k=own[1][1])),
        "replace the source": lambda c: (c.replace(2, k=own[1][0]), c.borrow(3, k=2)),
        "extend row": lambda c: c.extend((3, 4), 2, 2),
        "extend row shifted": lambda c: c.extend(3, 2, 2, shift=-0.7),
        "extend tensors": lambda c: c.extend(3, new[0], new[1], shift=shifts),
        "extend by a share": lambda c: (
            c.extend((3, 4), 2, 2, shift=0.4, share=0.3),
            c.extend(3, new[0], new[1], share=0.6),
        ),
        "extend twice": lambda c: (c.extend(3, 2, 2), c.extend((3, 0), new[0], new[1], shift=0.3)),
        "restrict": lambda c: c.restrict((1, 3), queries, keys),
        "restrict twice": lambda c: (c.restrict(3, queries, keys), c.restrict(3, *other)),
        "bias keys": lambda c: c.bias(3, key_factors=of_keys[0]),
        "bias keys summed": lambda c: c.bias(3, key_factors=factors[1]),
        "bias rank 3": lambda c: c.bias((3, 4), query_factors=factors[0], key_factors=factors[1]),
        "bias twice": lambda c: (
            c.bias(3, query_factors=factors[0], key_factors=factors[1]),
            c.bias(3, key_factors=of_keys[1]),
        ),
        "route replace": lambda c: c.route((3, 4), 2, token_map=dense),
        "route permute": lambda c: c.route(3, 2, token_map=moved),
        "route refine": lambda c: c.route(3, 2, token_map=moved, blend=others),
        "route blend": lambda c: c.route(3, 2, token_map=dense, blend=blend, gain=gain),
        "route reweight": lambda c: c.route(3, 2, gain=gain),
        "route zero gain": lambda c: c.route(3, 2, gain=0.0),
        "route one word": lambda c: c.route(3, 2, blend=word),
        "route itself": lambda c: c.route((3, 1), None, gain=gain, token_map=dense, blend=blend),
        "route from itself": lambda c: c.route(3, 3, token_map=dense, blend=blend),
        "route twice": lambda c: (
            c.route(3, 2, token_map=dense, blend=blend),
            c.route(3, None, gain=gain),
            c.route(3, 4, token_map=moved, blend=word),
        ),
        "add": lambda c: c.add(3, new[2], new[3], scale=0.6),
        "add masked": lambda c: c.add((3, 4), new[2], new[3], scale=-1.2, mask=unit),
        "add twice": lambda c: (c.add(3, new[0], new[3]), c.add(3, new[2], new[1], scale=2.0)),
        "probabilities": lambda c: c.probabilities((3, 0), lambda p: p.square() + 0.1),
    }
    if n == m:
        found["skip"] = lambda c: c.skip((3, 4))
    if case.joint:
        found["route image"] = lambda c: c.route(
            3, 2, token_map=dense, blend=blend, image_from_source=True
        )
        found["route image alone"] = lambda c: c.route(3, 2, blend=0.0, image_from_source=True)
        found["route image, all"] = lambda c: c.route(3, 2, token_map=moved, image_from_source=True)
    return found


def check(case: Case, *chosen: Script, tolerance: float = EXACT, maps: bool = True) -> Tensor:
    """Outputs and read-outs of all evaluators against the explicit matrices, which it returns."""
    explicit = case.explicit()
    for script in chosen:
        script(explicit)
    want = explicit.output()
    tokens = [0, 2, text(case) - 1]
    image = case.call().spans.image_queries
    for backend in BACKENDS:
        call, seen = case.call(), {}
        for script in chosen:
            script(call)
        if maps:
            call.read((2, 3), tokens, lambda row, p, seen=seen: seen.update({row.index: p}))
        out, _ = plan.evaluate(call, backend)
        close(out, want, tolerance, f"{backend} output")
        for row, p in seen.items():
            wanted = explicit.maps(row, tokens)[:, slice(*image)]
            close(p, wanted, tolerance, f"{backend} map of row {row}")
    return want


MASKS = ("none", "bool", "additive", "per head", "full")


def masked(kind: str, mask: str, **kwargs: Any) -> Case:
    case = make(kind, **kwargs)
    (n, m), heads = sizes(case), case.q.shape[2]
    keep = random(5, 1, 1, 1, m, seed=30) > -0.5
    case.mask = {
        "none": None,
        "bool": keep,
        "additive": (~keep).double() * -10000.0,
        "per head": random(5, 1, heads, 1, m, seed=31),
        "full": random(1, 1, 1, n, m, seed=32) > 0.7,  # some queries see nothing
    }[mask]
    return case


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_verb(kind: str, mask: str) -> None:
    case = masked(kind, mask)
    for script in scripts(case).values():
        check(case, script)


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
PAIRED = (
    "borrow qk (P2P)",
    "borrow kv where",
    "borrow twice",
    "replace qk (AdaIN)",
    "extend row shifted",
    "extend tensors",
    "extend by a share",
    "restrict",
    "restrict twice",
    "bias rank 3",
    "bias keys",
    "route replace",
    "route refine",
    "route itself",
    "add masked",
    "add",
    "probabilities",
    "skip",
    "route image",
)


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


def softmax(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax(q @ k.mT * scale, -1)


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


@pytest.mark.parametrize("few", [0, sdpa._FEW_SCORES], ids=["kind by kind", "by a mask"])
def test_regions_partition(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disjoint regions are attentions of their own; a query in none of them gives 0."""
    monkeypatch.setattr(sdpa, "_FEW_SCORES", few)
    case = make("self")
    labels = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2, SIGN, SIGN, SIGN, 0])
    check(case, lambda c: c.restrict(3, labels, labels))
    call = case.call()
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    call.restrict(3, labels, labels)
    out = plan.evaluate(call)[0][3]
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][3, ..., 11, :].any()
    for part in (slice(0, 4), slice(4, 8), slice(8, 11)):
        q, k, v = (x[3][..., part, :] for x in (case.q, case.k, case.v))
        close(out[..., part, :], softmax(q, k, case.scale) @ v, EXACT)
    assert (out[..., 11, :] == 0).all()


@pytest.mark.parametrize("many", [3, 64, 90])
def test_many_kinds_of_queries(many: int) -> None:
    """Few kinds attend kind by kind, many by chunks of a mask; with biases and a mask too."""
    case = make("self")
    n = 300
    case.q, case.k, case.v = (random(5, 1, 2, n, 8, seed=i) for i in range(3))
    case.mask = random(5, 1, 1, 1, n, seed=3)
    queries = torch.arange(n) % many * 7919
    keys = (random(n, seed=8) * 1e4).long()
    factors = random(n, 2, seed=9), random(n, 2, seed=10)
    check(case, lambda c: c.restrict(3, queries, keys))
    check(
        case,
        lambda c: c.restrict(3, queries, keys),
        lambda c: c.bias(3, query_factors=factors[0], key_factors=factors[1]),
        lambda c: c.extend(3, 2, 2),
    )


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
