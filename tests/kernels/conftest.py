"""Kernels are tested on the GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported (tests/conftest.py does it) and can't be
left again, so ahead-of-time compilation runs in a process of its own (aot.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hookctl.kernels.common import launch


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    """Fail clearly where Triton was imported before the interpreter was chosen."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    assert launch.interpreting() and isinstance(tl.zeros, InterpretedFunction), (
        "Triton was imported before TRITON_INTERPRET=1 was set; run pytest from the root of the "
        "checkout, so that tests/conftest.py is read first"
    )


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory is full of NaN, so that what a kernel forgets to write is seen."""
    with torch.device("cpu"):  # which remembers for good what makes tensors
        torch.empty(0)
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
    yield
