"""One softmax with several value tensors against explicit float64 matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hookctl.kernels.shared_probabilities import Group, reference, shared_probabilities
from tests.kernels.closeness import TOLERANCE, close, random

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SOURCE_AND_EDITS = [Group(0, 0, (0, 2, 1)), Group(2, 1, (1,))]
MORE_THAN_FIT = [Group(1, 0, (0, 1, 2, 0, 1))]


def stacks(n: int, m: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as the model's projections give them: tokens before heads, not contiguous."""
    return [
        random(3, 1, t, 2, d, seed=i, dtype=dtype).transpose(2, 3) for i, t in enumerate((n, m, m))
    ]


@pytest.mark.parametrize(
    ("groups", "n", "m", "d", "dtype"),
    [
        (SOURCE_AND_EDITS, 19, 37, 8, F32),
        (SOURCE_AND_EDITS, 9, 18, 40, BF16),
        (MORE_THAN_FIT, 17, 5, 64, F16),
        (SOURCE_AND_EDITS, 5, 19, 80, F16),
        (MORE_THAN_FIT, 5, 9, 96, F32),
        (SOURCE_AND_EDITS, 5, 9, 128, BF16),
        (SOURCE_AND_EDITS, 5, 9, 160, F16),
    ],
)
def test_output(groups: list[Group], n: int, m: int, d: int, dtype: torch.dtype) -> None:
    given = stacks(n, m, d, dtype)
    out, lse = shared_probabilities(*given, groups, 0.3)
    want, of_want = reference.shared_probabilities(*(x.double() for x in given), groups, 0.3)
    close("out", out, want, TOLERANCE[dtype])
    close("lse", lse, of_want, TOLERANCE[dtype])
    again, _ = shared_probabilities(*given, groups, 0.3)
    assert torch.equal(again, out), "every run gives the same bits"


@pytest.mark.parametrize(
    ("groups", "n", "m", "d", "dtype"),
    [(SOURCE_AND_EDITS, 9, 18, 20, F32), (MORE_THAN_FIT, 5, 9, 24, F16)],
)
def test_gradients(groups: list[Group], n: int, m: int, d: int, dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in stacks(n, m, d, dtype)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, lse = shared_probabilities(*leaves, groups, 0.3)
    want, of_want = reference.shared_probabilities(*exact, groups, 0.3)
    grads = random(*out.shape, seed=5, dtype=dtype), random(*lse.shape, seed=6)
    got = torch.autograd.grad([out, lse], leaves, grads)
    wants = torch.autograd.grad([want, of_want], exact, [g.double() for g in grads])
    for name, mine, theirs in zip(("dq", "dk", "dv"), got, wants, strict=True):
        close(name, mine, theirs, 2 * TOLERANCE[dtype])


def test_one_graph_when_compiled() -> None:
    leaves = [x.requires_grad_() for x in stacks(5, 9, 16, F32)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shared_probabilities(q * 2, k, v, SOURCE_AND_EDITS, 0.3)[0]

    want = run(*leaves)
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(out, want)
    grads = [torch.autograd.grad(x.sum(), leaves) for x in (out, want)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_strided_channels_and_bad_input() -> None:
    q, k, v = stacks(9, 11, 32, F32)
    halves = [x[..., ::2] for x in (q, k, v)]
    out, _ = shared_probabilities(*halves, SOURCE_AND_EDITS, 0.3)
    want, _ = shared_probabilities(*(x.contiguous() for x in halves), SOURCE_AND_EDITS, 0.3)
    assert torch.equal(out, want)
    with pytest.raises(ValueError, match="k and v of as many tokens"):
        shared_probabilities(q, k, v[..., 1:, :], SOURCE_AND_EDITS, 0.3)
    with pytest.raises(ValueError, match="give fp32, fp16 or bf16"):
        shared_probabilities(q.double(), k.double(), v.double(), SOURCE_AND_EDITS, 0.3)
    with pytest.raises(ValueError, match="one row of values or more"):
        shared_probabilities(q, k, v, [Group(0, 0, ())], 0.3)
    for beyond in (Group(3, 0, (0,)), Group(0, -1, (0,)), Group(0, 0, (0, 3))):
        with pytest.raises(ValueError, match="q, k, v have 3, 3, 3 rows"):
            shared_probabilities(q, k, v, [beyond], 0.3)
