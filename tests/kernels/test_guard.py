"""An installation whose Triton can't build a kernel is found out once, and SDPA serves."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hookctl.errors import UnsupportedError
from hookctl.evaluate import plan
from hookctl.evaluate import triton as fused
from hookctl.kernels.common import guard

CPU = torch.device("cpu")


class Broken:
    """A kernel that can't be built."""

    builds = 0

    def __getitem__(self, grid: Any) -> Any:
        self.builds += 1
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU that the tables know, with nothing tried yet."""
    monkeypatch.setattr(guard, "available", lambda device: None)
    monkeypatch.setattr(guard, "interpreting", lambda: False)
    monkeypatch.setattr(guard, "_tried", {})
    yield


def test_a_kernel_is_built_once(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert guard.usable(device) is None and guard._tried == {device: None}
    monkeypatch.setattr(guard, "_writes_one", Broken())
    assert guard.usable(device) is None


def test_one_that_can_not_be_built(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken()
    monkeypatch.setattr(guard, "_writes_one", broken)
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler. Please.*SDPA"):
        why = guard.usable(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guard.usable(CPU) == why and broken.builds == 1
    assert why is not None and why.startswith("Triton can't run a kernel on cpu (RuntimeError")
    monkeypatch.setattr(fused, "interpreting", lambda: True)  # its device is the CPU
    with pytest.raises(UnsupportedError, match="Triton can't run a kernel.*use 'auto' or 'sdpa'"):
        plan.check_backend("triton")


def test_one_that_does_nothing(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_writes_one", {(1,): lambda out: None})
    with pytest.warns(RuntimeWarning, match="left no trace"):
        assert guard.usable(CPU) is not None


def test_nothing_is_tried_without_need(untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "available", lambda device: "there is no GPU")
    assert guard.usable(CPU) == "there is no GPU" and not guard._tried


def test_without_triton() -> None:
    """Every module is imported, references run, and kernels say what is missing."""
    code = """
import pkgutil, sys
from importlib import import_module
sys.modules["triton"] = None
import torch
import hookctl.kernels
for module in pkgutil.walk_packages(hookctl.kernels.__path__, "hookctl.kernels."):
    import_module(module.name)
from hookctl.kernels.map_readout import map_readout, reference
from hookctl.kernels.fourier_gain import fourier_gain
x, token = torch.ones(1, 2, 3, 4), torch.zeros(1, dtype=torch.long)
assert fourier_gain(x, 0.5).shape == x.shape
assert reference.map_readout(x, x, token).shape == (1, 3, 1)
try:
    map_readout(x, x, token)
except ValueError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise AssertionError("a kernel ran")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
