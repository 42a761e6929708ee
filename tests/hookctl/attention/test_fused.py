"""Every verb through the fused kernel, against explicit matrices: fp32, 1e-5."""

from __future__ import annotations

import pytest
import torch

from hookctl.attention import plan
from tests.hookctl.attention.calls import Case, Script, close
from tests.hookctl.attention.test_algebra import masked, scripts

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
@pytest.mark.parametrize(
    ("kind", "mask", "heads"),
    [
        ("cross", "none", 1),
        ("cross", "per head", 2),
        ("self", "none", 1),
        ("image_text", "bool", 1),
    ],
)
def test_every_verb(kind: str, mask: str, heads: int) -> None:
    case = masked(kind, mask, heads=heads)
    for name, script in scripts(case).items():
        check(case, script, name=f"{kind}, {mask} mask: {name}")
