"""Every verb through the fused kernel, against explicit matrices: fp32, 1e-5.

Without a device Triton's interpreter runs the kernels, which is slow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookctl.evaluate import plan, triton
from hookctl.kernels.common import wins
from tests.hookctl.attention.calls import Case, Script, close, random
from tests.hookctl.evaluate.verbs import masked, scripts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5  # fp32


def in_singles(case: Case) -> Case:
    """The case in fp32, where the kernels run."""
    mask = case.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    q, k, v = (x.float().to(DEVICE) for x in (case.q, case.k, case.v))
    return Case(case.kind, q, k, v, case.scale, None if mask is None else mask.to(DEVICE))


def exact(case: Case) -> Case:
    """The same numbers in float64."""
    mask = case.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return Case(case.kind, case.q.double(), case.k.double(), case.v.double(), case.scale, mask)


def check(case: Case, *chosen: Script, name: str) -> None:
    single = in_singles(case)
    explicit, call = exact(single).explicit(), single.call()
    for script in chosen:
        script(explicit)
        script(call)
    out, found = plan.evaluate(call, "triton")
    assert found.name in ("triton", "matrix", "pass-through")
    close(out.cpu(), explicit.output(), TOLERANCE, name)


@pytest.mark.slow
def test_every_verb() -> None:
    case = masked("cross", "none", heads=1)
    for name, script in scripts(case).items():
        check(case, script, name=name)


# What masks of the model, several heads, long keys and joint sequences add to the above.
VERBS = (
    "borrow qk (P2P)",
    "borrow kv where",
    "extend by a share",
    "restrict",
    "bias twice",
    "route blend",
    "add masked",
    "skip",
    "route image",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mask", "heads"),
    [("cross", "per head", 2), ("self", "none", 1), ("image_text", "bool", 1)],
)
def test_verbs_of_other_calls(kind: str, mask: str, heads: int) -> None:
    case = masked(kind, mask, heads=heads)
    known = scripts(case)
    for name in VERBS:
        if name in known:
            check(case, known[name], name=f"{kind}, {mask} mask: {name}")


@pytest.mark.slow
def test_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared probabilities, regions and read-outs are taken, and agree."""
    from hookctl.kernels import map_readout, region_attention, shared_probabilities

    used: list[str] = []
    for module in (map_readout, region_attention, shared_probabilities):
        name = module.__name__.rsplit(".", 1)[1]
        kernel = getattr(module, name)

        def spied(*args: Any, kernel: Any = kernel, name: str = name, **kwargs: Any) -> Any:
            used.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(module, name, spied)
    case = masked("self", "none", heads=2)
    known = scripts(case)
    for script in ("borrow qk (P2P)", "restrict"):
        check(case, known[script], name=script)
    single = in_singles(case)
    explicit, call, seen = exact(single).explicit(), single.call(), {}
    for target in (explicit, call):
        known["borrow qk (P2P)"](target)
    call.read((2, 3), [0, 5], lambda row, p: seen.update({row.index: p}))
    plan.evaluate(call, "triton")
    for row, p in seen.items():
        close(p.cpu(), explicit.maps(row, [0, 5]), TOLERANCE, f"map of row {row}")
    assert sorted(seen) == [2, 3]
    counts = {name: used.count(name) for name in used}
    assert counts == {"shared_probabilities": 2, "region_attention": 1, "map_readout": 2}


@pytest.mark.slow
def test_marginals_by_their_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row's softmax is bare; an edited map is summed from its probabilities."""
    from hookctl.kernels import map_readout

    kernel, used = map_readout.key_marginals, []
    monkeypatch.setattr(map_readout, "key_marginals", lambda *a: used.append(1) or kernel(*a))
    case = in_singles(masked("self", "none", heads=2))
    known = scripts(case)
    explicit, call, seen = exact(case).explicit(), case.call(), {}
    for target in (explicit, call):
        known["borrow qk (P2P)"](target)
    keys = range(case.k.shape[-2])
    call.marginals((1, 2), lambda row, sums: seen.update({row.index: sums}))
    plan.evaluate(call, "triton")
    for row, sums in seen.items():
        want = explicit.maps(row, [*keys]).sum(-2)
        close(sums.cpu(), want, TOLERANCE, f"marginals of row {row}")
    assert len(used) == len(seen) == 2
    biased = case.call()
    known["bias twice"](biased)
    biased.marginals(3, lambda row, sums: None)
    plan.evaluate(biased, "triton")
    assert len(used) == 2


def test_the_table_says_where_kernels_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows of one softmax and by kinds of regions; an entry serves what lies between it and the
    next."""
    monkeypatch.setattr(wins, "arch_of", lambda device: "sm_90")
    case = masked("self", "none", heads=1)
    known = scripts(case)
    call = case.call()
    known["borrow qk (P2P)"](call)
    finished = call.fold()
    assert list(triton._sharing(finished, range(5)).values()) == [[2, 3, 4]]
    restricted = case.call()
    known["restrict"](restricted)
    assert triton._suits_others(call, finished) is None  # 12 keys
    assert triton._suits_others(restricted, restricted.fold()) is None

    def table(of_arch: dict[int, int | None]) -> None:
        kernels = (wins.SHARED, wins.REGIONS)
        monkeypatch.setattr(wins, "_shipped", {kernel: {"sm_90": of_arch} for kernel in kernels})

    table({4: 12})  # the call has 3 rows of one softmax, the other 6 kinds of queries
    assert triton._suits_others(call, finished) is None
    assert "6 kinds of queries" in (triton._suits_others(restricted, restricted.fold()) or "")
    table({2: 12, 4: None})
    assert "3 rows of one softmax" in (triton._suits_others(call, finished) or "")
    assert triton._suits_others(restricted, restricted.fold()) is None
    table({2: 13})
    assert triton._suits_others(call, finished) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["borrow qk (P2P)", "restrict"])
def test_gradients(name: str) -> None:
    """Energies may flow through edited calls: gradients to q, k and v as of explicit matrices."""
    single = in_singles(masked("self", "none", heads=1))
    wide = exact(single)
    script = scripts(single)[name]
    leaves = [[x.requires_grad_() for x in (c.q, c.k, c.v)] for c in (single, wide)]
    call, explicit = single.call(), wide.explicit()
    script(call)
    script(explicit)
    out, _ = plan.evaluate(call, "triton")
    want = explicit.output()
    gradient = random(*want.shape, seed=50)
    got = torch.autograd.grad(out, leaves[0], gradient.to(out))
    wants = torch.autograd.grad(want, leaves[1], gradient.to(want))
    for kind, mine, theirs in zip("qkv", got, wants, strict=True):
        close(mine.cpu(), theirs.cpu(), 4 * TOLERANCE, f"{name}: gradient of {kind}")
