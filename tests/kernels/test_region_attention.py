"""Region attention against an explicit float64 mask: outputs, log-sum-exps, gradients, lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hookctl.kernels.region_attention import lists, reference, region_attention
from hookctl.kernels.region_attention.tile_lists import tile_lists
from tests.kernels.closeness import DEVICE, TOLERANCE, close, random

SIGN = -(1 << 63)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def regions(*shape: int, seed: int, sets: tuple[int, ...] = (1, 2, 3, SIGN, SIGN | 4)) -> Tensor:
    """Runs of tokens with equal bit sets, as regions on a grid have them; the last two see none."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(sets), shape, generator=generator).sort(-1).values
    found = torch.tensor(sets)[chosen]
    found[..., -2:] = 1 << (3 + seed)
    return found.to(DEVICE)


def heads(batch: int, count: int, tokens: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[batch, heads, tokens, channels] as the model's projections give it: not contiguous."""
    return random(batch, tokens, count, width, seed=seed, dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize(
    ("n", "m", "width", "dtype", "rows"),
    [
        (37, 37, 8, F32, 0),  # self
        (35, 21, 40, F32, 2),  # cross, regions of each row
        (20, 33, 80, F16, 0),
        (33, 18, 96, BF16, 0),
        (18, 18, 160, F32, 0),
        (18, 18, 160, F16, 2),
    ],
)
def test_output_and_gradients(n: int, m: int, width: int, dtype: torch.dtype, rows: int) -> None:
    given = [heads(2, 1, t, width, i, dtype) for i, t in enumerate((n, m, m))]
    shape = (rows,) if rows else ()
    sees, seen = regions(*shape, n, seed=1), regions(*shape, m, seed=2, sets=(1, SIGN, 6, 0))
    grad, grad_lse = heads(2, 1, n, width, 5, dtype), random(2, 1, n, seed=6)
    exact = [x.double().requires_grad_() for x in given]
    want, want_lse = reference.region_attention(*exact, sees, seen)
    found = torch.isfinite(want_lse)
    assert not found.all() and found.any(), "the case has empty rows"
    finite = want_lse.masked_fill(~found, 0.0)
    wants = torch.autograd.grad([want, finite], exact, [grad.double(), grad_lse.double()])

    leaves = [x.detach().requires_grad_() for x in given]
    out, lse = region_attention(*leaves, sees, seen)
    close("out", out, want, TOLERANCE[dtype])
    close("lse", lse[found], want_lse[found], TOLERANCE[dtype])
    assert (lse[~found] == float("-inf")).all() and (out[~found] == 0).all()
    grads = torch.autograd.grad([out, lse], leaves, [grad, grad_lse])
    for name, got, expected in zip(("dq", "dk", "dv"), grads, wants, strict=True):
        close(name, got, expected, TOLERANCE[dtype])


def test_a_joint_sequence_and_bits() -> None:
    """Text that all see, at the end of the image's tokens; every run gives the same bits."""
    q, k, v = (heads(1, 2, 40, 64, i, F32) for i in range(3))
    bits = regions(40, seed=3)
    bits[30:] = -1
    runs = [region_attention(q, k, v, bits, bits, scale=0.3) for _ in range(2)]
    want, want_lse = reference.region_attention(q.double(), k.double(), v.double(), bits, bits, 0.3)
    close("out", runs[0][0], want, TOLERANCE[F32])
    close("lse", runs[0][1], want_lse, TOLERANCE[F32])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tiles_without_an_allowed_pair_are_not_read() -> None:
    """Values that are NaN would spoil every row that multiplies them by 0."""
    q, k, v = (heads(1, 1, 64, 16, i, F32) for i in range(3))
    bits = torch.ones(64, dtype=torch.int64, device=DEVICE)
    bits[16:32], bits[32:] = 2, SIGN
    k, v = k.clone(), v.clone()
    k[:, :, 16:32], v[:, :, 16:32] = float("nan"), float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sees = torch.where(bits == 2, 1, bits)
    listed = tile_lists(sees[None], bits[None], 16, 16)
    if DEVICE == "cpu":
        out, _ = region_attention(*leaves, sees, bits, listed=listed)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert torch.isfinite(out).all() and torch.isfinite(grads[0]).all()
    assert listed[1][0].tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]]
    assert listed[0][0, 2, :2].tolist() == [2, 3]


def test_lists_tell_full_tiles_from_tested_ones() -> None:
    queries = torch.tensor([[1, 1, 1, 3, 4, 4, SIGN, 0]])
    keys = torch.tensor([[1, 1, 2, 3, SIGN]])
    order, counts = tile_lists(queries, keys, 2, 2)
    #            whole: share one region; some: at least one pair is allowed
    assert counts[0].tolist() == [[1, 2], [1, 2], [0, 0], [0, 1]]
    assert order[0, 0, :2].tolist() == [0, 1] and order[0, 3, 0].item() == 2


def test_strided_channels_and_given_lists() -> None:
    q, k, v = (heads(1, 1, 20, 32, i, F32)[..., ::2] for i in range(3))
    sees, seen = regions(20, seed=1), regions(20, seed=2)
    listed = lists(sees, seen, q)
    out, _ = region_attention(q, k, v, sees, seen, listed=listed)
    close(
        "out",
        out,
        reference.region_attention(q.double(), k.double(), v.double(), sees, seen)[0],
        TOLERANCE[F32],
    )
    leaf = q.detach().requires_grad_()
    (dq,) = torch.autograd.grad(region_attention(leaf, k, v, sees, seen)[0].sum(), leaf)
    exact = leaf.detach().double().requires_grad_()
    want = reference.region_attention(exact, k.double(), v.double(), sees, seen)[0].sum()
    close("dq", dq, torch.autograd.grad(want, exact)[0], TOLERANCE[F32])


def test_compiled_without_graph_breaks() -> None:
    q, k, v = (heads(1, 1, 18, 16, i, F32).requires_grad_() for i in range(3))
    bits = regions(18, seed=1)
    compiled = torch.compile(
        lambda q, k, v: region_attention(q * 2, k, v, bits, bits)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = reference.region_attention(exact[0] * 2, *exact[1:], bits, bits)[0]
    out = compiled(q, k, v)
    close("out", out, want, TOLERANCE[F32])
    grad = random(*out.shape, seed=9)
    wants = torch.autograd.grad(want, exact, grad.double())
    for got, expected in zip(torch.autograd.grad(out, (q, k, v), grad), wants, strict=True):
        close("grad", got, expected, TOLERANCE[F32])
