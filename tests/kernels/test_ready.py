"""A launch made by itself hands over what Triton's own would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.compiler.compiler import LazyDict
from triton.runtime.jit import JITFunction

from hookctl.kernels import ready
from hookctl.kernels.ready import Ready
from tests.kernels.driverless import Handed, driverless

GRID = (3, 2)
CONSTANTS = {"n": 48, "scale": 0.5, "stride": 1, "BLOCK": 16, "enable_fp_fusion": True}


def _add(
    x_ptr, y_ptr, n, scale, stride, table_ptr, out_ptr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    pass


@pytest.fixture
def handed() -> Iterator[Handed]:
    with driverless() as found:
        yield found


def by_tensors(given: Any) -> dict[str, int]:
    return {"ALIGN": 4 if given["x_ptr"].data_ptr() % 16 == 0 else 1}


def launched() -> tuple[Any, Ready, Tensor]:
    kernel, table = JITFunction(_add), torch.zeros(4)
    return kernel, Ready(kernel, GRID, CONSTANTS | {"table_ptr": table}, by_tensors), table


def tensors(skip: int = 0, y: bool = True) -> dict[str, Tensor | None]:
    """Some that lie `skip` elements behind an aligned place."""
    x, other, out = (torch.empty(64)[skip : skip + 48] for _ in range(3))
    return {"x_ptr": x, "out_ptr": out, "y_ptr": other if y else None}


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x is y or (not isinstance(x, Tensor) and _said(x) == _said(y)) for x, y in pairs)


def _said(x: Any) -> Any:
    """What profilers are told is made for each launch."""
    return x.get() if isinstance(x, LazyDict) else x


@pytest.mark.parametrize("y", (True, False))
@pytest.mark.parametrize("skip", (0, 1, 4))
def test_the_same_arguments(handed: Handed, skip: int, y: bool) -> None:
    kernel, launch, table = launched()
    launch(**tensors(skip, y))
    assert handed.looked_up == 1
    given = tensors(skip, y)
    launch(**given)
    assert handed.looked_up == 1  # by itself
    kernel[GRID](**CONSTANTS, **given, table_ptr=table, **by_tensors(given))
    _, mine, triton_s = handed
    assert same(mine, triton_s)
    values = mine[-len(kernel.arg_names) :]
    assert dict(zip(kernel.arg_names, values, strict=True))["out_ptr"] is given["out_ptr"]


def test_what_is_compiled_for(handed: Handed) -> None:
    """Triton is asked again where a tensor lies otherwise, and has another kernel for it."""
    _, launch, _ = launched()
    for skip, y in ((0, True), (1, True), (0, False), (0, True), (1, True), (0, False), (1, True)):
        launch(**tensors(skip, y))
    assert handed.looked_up == 3
    function = 4  # its place behind grid and stream
    kernels = [arguments[function] for arguments in handed]
    assert kernels[:3] == [kernels[3], kernels[4], kernels[5]] and kernels[6] is kernels[1]
    assert len(set(map(id, kernels))) == 3


def test_far_tensors_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = (torch.empty(n, dtype=torch.int8, device="meta") for n in (2**31 - 1, 2**31))
    assert ready._lies(near) == ready._lies(far)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert ready._lies(near) != ready._lies(far)


def test_an_older_triton(handed: Handed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose compiled kernels took other arguments is asked every time."""
    monkeypatch.setattr(ready, "_BY_ITSELF", False)
    _, launch, _ = launched()
    for _ in range(3):
        launch(**tensors())
    assert handed.looked_up == len(handed) == 3


def test_nothing_is_kept(handed: Handed) -> None:
    import gc
    import weakref

    _, launch, _ = launched()
    given = tensors()
    refs = [weakref.ref(x) for x in given.values() if x is not None]
    launch(**given)
    launch(**given)
    handed.clear()
    del given
    gc.collect()
    assert not any(ref() is not None for ref in refs)
