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

from hookctl.kernels import (
    map_readout,
    ready,
    region_attention,
    shared_probabilities,
    sum_of_terms,
)
from hookctl.kernels.common import stretches
from hookctl.kernels.operators import shortcut
from hookctl.kernels.ready import Ready
from tests.kernels.closeness import DEVICE, random
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


def made(seed: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Operators that are made ready, with arguments whose numbers follow from the seed."""
    q, k, v = (random(4, 1, 1, 16, 64, seed=seed + i, dtype=torch.float16) for i in range(3))
    flat = q[:, 0], k[:, 0], v[:, 0]
    terms = stretches.encode([stretches.Stretch(row, row, row, row) for row in range(4)])
    bits = (torch.arange(16, device=DEVICE) % 3 + 1).expand(4, -1)
    tokens = torch.tensor([[1, 5, 7]], device=DEVICE).expand(4, -1)
    lse = (flat[0].float() @ flat[1].float().mT * 0.125).logsumexp(-1)
    listed = region_attention.lists(bits[0], bits[0], flat[0])
    return {
        "sum": (sum_of_terms._forward_op, ([q], [k], [v], *[None] * 4, *terms, 4, 0.125, True)),
        "shared": (shared_probabilities._operator, (q, k, v, [0, 0, 2, 0, 1, 2, 2, 1, 3], 0.125)),
        "regions": (region_attention._operator, (*flat, bits, bits, *listed, 0.125)),
        "maps": (map_readout._operator, (*flat[:2], tokens, None, 0.125)),
        "marginals": (map_readout._marginals_operator, (*flat[:2], lse, 0.125)),
    }


@pytest.mark.parametrize("name", ("sum", "shared", "regions", "maps", "marginals"))
def test_numbers_of_later_launches(name: str) -> None:
    """As of the first one, by Triton, to the last bit: on a device, and in the interpreter."""
    operator, arguments = made(0)[name]
    run = shortcut(operator._opoverload, arguments)
    for seed in range(3):
        _, arguments = made(10 * seed)[name]
        got, want = run(*arguments), operator(*arguments)
        pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


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
