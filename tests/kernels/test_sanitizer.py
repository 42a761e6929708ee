"""The watch over kernels in the interpreter sees what it is there for."""

from __future__ import annotations

import pytest
import torch

from hookctl.kernels.common.guard import jit, tl
from tests.kernels.closeness import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU compute-sanitizer watches")


@jit
def _copies(x_ptr, out_ptr, length, shift, step, N: tl.constexpr, PROMISED: tl.constexpr):
    """out = x, shifted; each program writes from `step` places after the one before it on."""
    at = tl.program_id(0) * step
    if PROMISED > 1:
        at = tl.multiple_of(at, PROMISED)
    i = at + tl.arange(0, N)
    x = tl.load(x_ptr + i + shift, mask=i < length, other=0.0)
    tl.store(out_ptr + i, x, mask=i < length)


@jit
def _sums_without_a_stand_in(x_ptr, out_ptr, length, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + i, mask=i < length), 0))


@jit
def _writes_one_place(out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N) * 0, tl.zeros([N], tl.float32))


def copied(shift: int = 0, step: int = 4, promised: int = 1, in_place: bool = False) -> None:
    x = torch.arange(10.0)
    middle = x[1:9]  # memory is there before and behind
    out = middle if in_place else torch.empty(8)
    _copies[(2,)](middle, out, 8, shift, step, N=4, PROMISED=promised)
    if not in_place:
        assert torch.equal(out, middle)


def test_clean_kernels_pass() -> None:
    copied()
    copied(promised=4)
    copied(in_place=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shift": -1}, "reads 1 elements outside its tensors"),
        ({"shift": 1}, "reads 1 elements outside its tensors"),
        ({"step": 3}, "writes where program 0 writes too"),
        ({"shift": 4, "in_place": True}, "outside its tensors|writes what program"),
        ({"promised": 8}, "promised to be a multiple of 8"),
    ],
    ids=str,
)
def test_faults_are_seen(given: dict[str, int], said: str) -> None:
    with pytest.raises(Exception, match=said):
        copied(**given)


def test_strided_neighbours_are_outside() -> None:
    x = torch.zeros(16)
    with pytest.raises(Exception, match="reads 2 elements outside"):
        _copies[(1,)](x[::2], torch.empty(4), 4, 0, 4, N=4, PROMISED=1)


def test_masked_loads_give_garbage() -> None:
    out = torch.zeros(1)
    _sums_without_a_stand_in[(1,)](torch.ones(4), out, 3, N=4)
    assert out.isnan()


def test_one_program_writes_a_place_once_at_a_time() -> None:
    with pytest.raises(Exception, match="writes one place twice"):
        _writes_one_place[(1,)](torch.empty(4), N=4)
