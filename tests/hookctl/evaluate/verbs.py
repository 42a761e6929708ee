"""Uses of every verb on a small call, and their check against explicit matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hookctl.evaluate import plan
from tests.hookctl.attention.calls import TEXT, Case, Script, close, make, random

BACKENDS = ("auto", "sdpa", "reference")
EXACT = 1e-10  # float64
SIGN = -(1 << 63)
MASKS = ("none", "bool", "additive", "per head", "full")
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
    image, keys = case.call().spans[:2]
    queries = [0, image[1] - image[0] - 1]
    evaluated = set()
    for backend in BACKENDS:
        if backend in evaluated:
            continue  # it is what "auto" chose
        call, seen, looks = case.call(), {}, {}
        for script in chosen:
            script(call)
        if maps:
            call.read((2, 3), tokens, lambda row, p, seen=seen: seen.update({row.index: p}))
            if keys is not None:
                call.read_queries((2, 3), queries, lambda row, p, to=looks: to.update({row: p}))
        out, used = plan.evaluate(call, backend)
        evaluated.add(used.name)
        close(out, want, tolerance, f"{backend} output")
        for row, p in seen.items():
            wanted = explicit.maps(row, tokens)[:, slice(*image)]
            close(p, wanted, tolerance, f"{backend} map of row {row}")
        for row, p in looks.items():
            wanted = explicit.lines(row.index)[:, slice(*image)][:, queries, slice(*keys)]
            close(p, wanted, tolerance, f"{backend} lines of row {row}")
    return want


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


def softmax(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax(q @ k.mT * scale, -1)
