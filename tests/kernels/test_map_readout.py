"""Maps of chosen keys against explicit float64 probabilities, with their gradients."""

from __future__ import annotations

import pytest
import torch

from hookctl.kernels.map_readout import key_marginals, map_readout, reference
from tests.kernels.closeness import DEVICE, TOLERANCE, close, random

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("n", "m", "width", "dtype", "tokens"),
    [
        (33, 21, 8, F32, [3, 0, 20]),
        (20, 18, 80, F32, [[1, 17, -1], [5, 5, 6]]),  # a key twice, a place without a key
        (18, 18, 40, F16, [0, 17]),
        (18, 20, 160, F16, [7]),
        (18, 18, 96, BF16, list(range(18))),
    ],
)
def test_maps_and_gradients(
    n: int, m: int, width: int, dtype: torch.dtype, tokens: list[int]
) -> None:
    q, k = (
        random(2, t, 2, width, seed=i, dtype=dtype).transpose(1, 2) for i, t in enumerate((n, m))
    )
    chosen = torch.tensor(tokens, device=DEVICE)
    grad = random(2, n, chosen.shape[-1], seed=5)
    exact = [x.double().requires_grad_() for x in (q, k)]
    want = reference.map_readout(*exact, chosen, 0.4)
    wants = torch.autograd.grad(want, exact, grad.double())
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    got = map_readout(*leaves, chosen, 0.4)
    assert got.dtype == F32
    close("map", got, want, TOLERANCE[dtype])
    for name, g, w in zip(("dq", "dk"), torch.autograd.grad(got, leaves, grad), wants, strict=True):
        close(name, g, w, TOLERANCE[dtype])


def test_given_log_sum_exp_strided_channels_and_bits() -> None:
    q, k = (random(1, 2, t, 32, seed=i)[..., ::2] for i, t in enumerate((20, 35)))
    chosen = torch.tensor([2, 34], device=DEVICE)
    lse = (q @ k.mT * 0.25).logsumexp(-1)
    runs = [map_readout(q, k, chosen, lse=lse) for _ in range(2)]
    close("map", runs[0], reference.map_readout(q.double(), k.double(), chosen), TOLERANCE[F32])
    assert torch.equal(*runs)


def test_more_tokens_than_one_launch_takes() -> None:
    q, k = random(1, 1, 17, 16), random(1, 1, 150, 16, seed=1)
    chosen = torch.arange(149, -1, -1, device=DEVICE)
    got = map_readout(q, k, chosen)
    close("map", got, reference.map_readout(q.double(), k.double(), chosen), TOLERANCE[F32])
    close("sum", got.sum(-1), torch.ones(1, 17, device=DEVICE), TOLERANCE[F32])


@pytest.mark.parametrize("given", [True, False])
def test_marginals(given: bool) -> None:
    q, k = random(2, 2, 37, 40), random(2, 2, 21, 40, seed=1)
    scores = q.double() @ k.double().mT * 0.1
    lse = scores.logsumexp(-1).float() if given else None
    got = key_marginals(q, k, 0.1, lse)
    close("marginals", got, reference.key_marginals(q.double(), k.double(), 0.1), TOLERANCE[F32])


def test_compiled_without_graph_breaks() -> None:
    q, k = (random(1, 1, t, 16, seed=t).requires_grad_() for t in (18, 20))
    chosen = torch.tensor([1, 4], device=DEVICE)
    compiled = torch.compile(
        lambda q, k: map_readout(q * 2, k, chosen), fullgraph=True, backend="aot_eager"
    )
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    want = reference.map_readout(exact[0] * 2, exact[1], chosen)
    out = compiled(q, k)
    close("map", out, want, TOLERANCE[F32])
    grad = random(*out.shape, seed=9)
    wants = torch.autograd.grad(want, exact, grad.double())
    for got, expected in zip(torch.autograd.grad(out, (q, k), grad), wants, strict=True):
        close("grad", got, expected, TOLERANCE[F32])
