"""The sum of terms, forward and backward, against explicit matrices in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.kernels.sum_of_terms import Stretch, forward, reference, sum_of_terms
from tests.kernels.closeness import TOLERANCE, close, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF = float("inf")
HEADS = 2


@dataclass
class Case:
    """Stacks, terms and what else a call is given."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    terms: list[Stretch]
    scale: float = 0.3
    options: dict[str, Any] = field(default_factory=dict)

    def learning(self) -> Case:
        """A copy whose stacks and weights learn."""
        q, k, v = ([x.detach().requires_grad_() for x in s] for s in (self.q, self.k, self.v))
        options = dict(self.options)
        if "weights" in options:
            options["weights"] = options["weights"].detach().requires_grad_()
        return Case(q, k, v, self.terms, self.scale, options)

    def double(self) -> Case:
        def wide(x: Any) -> Any:
            return tuple(y.double() for y in x) if isinstance(x, tuple) else x.double()

        q, k, v = ([x.double() for x in stacks] for stacks in (self.q, self.k, self.v))
        return Case(q, k, v, self.terms, self.scale, {n: wide(x) for n, x in self.options.items()})

    def run(self, lse: bool = False) -> tuple[Tensor, Tensor | None]:
        return sum_of_terms(self.q, self.k, self.v, self.terms, self.scale, lse=lse, **self.options)

    def explicit(self) -> tuple[Tensor, Tensor]:
        return reference.sum_of_terms(
            self.q, self.k, self.v, self.terms, self.scale, **self.options
        )

    def leaves(self) -> dict[str, Tensor]:
        found = {f"{n}{i}": x for n in "qkv" for i, x in enumerate(getattr(self, n))}
        return found | {n: x for n, x in self.options.items() if n == "weights"}


def stacks(rows: int, tokens: Sequence[int], d: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """One stack per length of `tokens`."""
    return [random(rows, 1, HEADS, n, d, seed=seed + i, dtype=dtype) for i, n in enumerate(tokens)]


def plain(dtype: torch.dtype, n: int, m: int, d: int) -> Case:
    terms = [Stretch(0, 0, 0, 0), Stretch(1, 1, 1, 1)]
    q, k, v = (stacks(2, [t], d, dtype, seed) for seed, t in ((1, n), (2, m), (3, m)))
    return Case(q, k, v, terms, d**-0.5)


def borrowed(dtype: torch.dtype, n: int, m: int, d: int) -> Case:
    """Self-replacement and mutual self-attention with masks: weights, rows that share sources."""
    terms = [
        Stretch(0, 0, 0, 0),
        Stretch(1, 0, 0, 1),
        Stretch(2, 2, 0, 0, weight=0.7, weights=1),
        Stretch(2, 2, 2, 2, weights=0),
    ]
    q, k, v = (stacks(3, [t], d, dtype, seed) for seed, t in ((1, n), (2, m), (3, m)))
    return Case(q, k, v, terms, options={"weights": random(2, n, seed=9).sigmoid()})


def extended(dtype: torch.dtype, n: int, m: int, d: int) -> Case:
    """Softmaxes over several stretches, shifted, from other stacks, and an adapter's term."""
    terms = [
        Stretch(0, 0, 0, 0, closes=False),
        Stretch(0, 0, 2, 2, shift=-0.7, closes=False),
        Stretch(0, 0, 1, 3, shift=0.4, weight=-0.5, weights=0),
        Stretch(1, 1, 1, 1),
        Stretch(1, 0, 2, 2, weight=0.6),
    ]
    q = stacks(2, [n], d, dtype, 1)
    k, v = (stacks(2, [m, 5], d, dtype, seed) for seed in (2, 4))
    terms[2] = terms[2]._replace(v=1)
    return Case(q, k, v, terms, options={"weights": random(1, n, seed=9).sigmoid()})


def biased(dtype: torch.dtype, n: int, m: int, d: int) -> Case:
    """Key biases per head with forbidden keys and an empty row, and rank-3 biases."""
    bias = random(3, 1, 2, m, seed=5)
    bias[0, ..., ::3] = -INF
    bias[1] = -INF
    terms = [
        Stretch(0, 0, 0, 0, bias=0, factors=1),
        Stretch(1, 1, 1, 1, bias=1),
        Stretch(2, 2, 2, 2, factors=0),
        Stretch(2, 0, 1, 2, bias=2, weight=0.5),
    ]
    q, k, v = (stacks(3, [t], d, dtype, seed) for seed, t in ((1, n), (2, m), (3, m)))
    factors = random(2, n, 3, seed=6, dtype=dtype), random(2, m, 3, seed=7, dtype=dtype)
    return Case(q, k, v, terms, options={"bias": bias, "factors": factors})


CASES: dict[str, Callable[..., Case]] = {
    "plain": plain,
    "borrowed": borrowed,
    "extended": extended,
    "biased": biased,
}


def check(case: Case, dtype: torch.dtype) -> None:
    """Output and log-sum-exp against the explicit form."""
    tolerance = TOLERANCE[dtype]
    out, lse = case.run(lse=True)
    assert lse is not None
    wide = case.double()
    want, of_want = reference.sum_of_terms(
        wide.q, wide.k, wide.v, wide.terms, wide.scale, **wide.options
    )
    close("out", out, want, tolerance)
    empty = of_want == -INF
    assert torch.equal(lse == -INF, empty), "lse of empty rows"
    close("lse", lse.masked_fill(empty, 0.0), of_want.masked_fill(empty, 0.0), tolerance)


def check_gradients(case: Case, dtype: torch.dtype, through_lse: bool = False) -> None:
    """Gradients of every stack and of the weights against autograd through the explicit form."""
    ours, wide = case.learning(), case.double().learning()
    out, lse = ours.run(lse=True)
    assert lse is not None
    want, of_want = reference.sum_of_terms(
        wide.q, wide.k, wide.v, wide.terms, wide.scale, **wide.options
    )
    gradient = random(*out.shape, seed=20, dtype=dtype)
    of_lse = random(*lse.shape, seed=21) * through_lse
    total = (out * gradient).sum() + (lse * of_lse).nan_to_num().sum()
    (want * gradient.double()).sum().add((of_want * of_lse.double()).nan_to_num().sum()).backward()
    total.backward()
    mine, theirs = ours.leaves(), wide.leaves()
    for name, x in mine.items():
        close(f"gradient of {name}", x.grad, theirs[name].grad, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("d", [8, 40, 64, 80, 96, 128, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(dtype: torch.dtype, d: int) -> None:
    check(plain(dtype, 5, 19, d), dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype: torch.dtype, name: str) -> None:
    check(CASES[name](dtype, 9, 18, 24), dtype)


# Tiles are 16 x 16 in the interpreter, whose time goes with their number.
@pytest.mark.parametrize(
    ("name", "dtype", "n", "m"),
    [
        ("plain", torch.float32, 18, 9),
        ("plain", torch.bfloat16, 9, 18),
        ("borrowed", torch.float32, 9, 18),
        ("borrowed", torch.float16, 18, 9),
        ("extended", torch.float32, 9, 9),
        ("biased", torch.float32, 7, 9),
    ],
    ids=str,
)
def test_backward(name: str, dtype: torch.dtype, n: int, m: int) -> None:
    check_gradients(CASES[name](dtype, n, m, 20), dtype)


@pytest.mark.parametrize(
    ("keys", "form"), [(128, "_short"), (129, "_short"), (256, "_short"), (257, "_long")]
)
def test_whole_softmaxes_of_up_to_256_keys(
    keys: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that holds them, with empty rows, biases and several terms; longer ones walk."""
    chosen, used = forward._chosen, []

    def spied(*given: Any) -> Any:
        found = chosen(*given)
        used.append((found[0].fn.__name__, found[2]["BN"]))
        return found

    monkeypatch.setattr(forward, "_chosen", spied)
    case = biased(torch.float32, 9, keys, 24)
    check(case, torch.float32)
    if keys == 256:
        check(borrowed(torch.float16, 5, keys, 80), torch.float16)
    assert {name for name, _ in used} == {form}
    if form == "_short":
        assert {size for _, size in used} == {128 if keys <= 128 else 256}


def test_one_graph_when_compiled() -> None:
    """The operator is opaque to the compiler, forward and backward."""
    ours, again = (borrowed(torch.float32, 9, 9, 16).learning() for _ in range(2))

    def run(case: Case) -> Tensor:
        return case.run()[0]

    want = run(ours)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(again)
    want.sum().backward()
    compiled.sum().backward()
    assert torch.equal(compiled, want)
    for name, x in ours.leaves().items():
        assert torch.equal(again.leaves()[name].grad, x.grad), name


def test_strides_and_bad_input() -> None:
    """Transposed and expanded stacks are read where they lie; what can't be is refused."""
    case = plain(torch.float32, 9, 11, 16)
    want, _ = case.run()
    case.q = [case.q[0].permute(4, 3, 0, 1, 2).contiguous().permute(2, 3, 4, 1, 0)]
    case.k = [case.k[0].transpose(2, 3).contiguous().transpose(2, 3)]
    got, _ = case.run()
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="sort the terms by row"):
        sum_of_terms(case.q, case.k, case.v, case.terms[::-1], case.scale)
    with pytest.raises(ValueError, match="give fp32, fp16 or bf16"):
        case.double().run()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"terms": {"q": 3}}, "q=3.*there are 3 rows of q"),
        ({"terms": {"v": -1}}, "v=-1.*there are 3 rows of v"),
        ({"terms": {"weights": 0}}, "weights=0.*there are 0 rows of weights"),
        ({"terms": {"bias": 3}}, "bias=3.*there are 3 rows of bias"),
        ({"weights": random(2, 8)}, r"weights is \(2, 8\) on .*; give \[rows, 9\]"),
        ({"bias": random(3, 1, 2, 17)}, "give .rows, 1 or 1, 2 or 1, 18 or more.*"),
        ({"bias": random(3, 18)}, r"bias is \(3, 18\)"),
        ({"factors": (random(2, 8, 3), random(2, 18, 3))}, "the first of factors is .*9, r"),
        ({"factors": (random(2, 9, 3), random(2, 17, 3))}, "second of factors .*18 or more, 3"),
        ({"factors": (random(2, 9, 3), random(1, 18, 3))}, "second of factors .*18 or more, 3"),
        ({"v": stacks(3, [17], 16, torch.float32, 3)}, "has 18 keys and 17 values"),
        ({"q": stacks(1, [9, 9, 8], 16, torch.float32, 3)}, r"have \[9, 9, 8\] tokens"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_nothing_is_read_beyond_what_is_given(changed: dict[str, Any], said: str) -> None:
    case = biased(torch.float32, 9, 18, 16)
    of_term = changed.pop("terms", {})
    case.terms[0] = case.terms[0]._replace(**of_term)
    given = {"q": case.q, "k": case.k, "v": case.v, **case.options, **changed}
    with pytest.raises(ValueError, match=said):
        sum_of_terms(terms=case.terms, scale=case.scale, **given)
