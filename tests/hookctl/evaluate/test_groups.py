"""Which rows attend together by SDPA."""

from __future__ import annotations

import pytest
import torch

from hookctl.attention.call import AttentionCall
from hookctl.evaluate import sdpa
from tests.hookctl.attention.calls import Case, Script, torch_calls
from tests.hookctl.evaluate.test_algebra import check, masked, scripts


def calls(case: Case, script: Script) -> int:
    return torch_calls(case, script)["scaled_dot_product_attention"]


def swap(c: AttentionCall) -> None:
    """Prompt-to-Prompt's self-replacement: two rows take q and k from a third."""
    c.borrow((3, 4), q=2, k=2)


@pytest.mark.parametrize("mask", ("none", "bool", "full"))
@pytest.mark.parametrize("kind", ("self", "text_image"))
def test_rows_read_where_they_lie(kind: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large calls nothing is copied for rows that nothing rewrote: small ones are not all."""
    monkeypatch.setattr(sdpa, "_FEW_QUERIES", 0)
    case = masked(kind, mask)
    assert calls(case, swap) == 2
    for script in scripts(case).values():
        check(case, script, maps=False)


def test_one_call_where_copies_are_cheap() -> None:
    case = masked("self", "none")
    assert calls(case, swap) == 1
    assert calls(case, lambda c: c.borrow(0, k=3, v=3)) == 1
    # Another sum than the others', or copies of whole masks: on their own.
    assert calls(case, lambda c: c.extend(4, 2, 2)) == 2
    assert calls(case, lambda c: c.borrow(4, k=2, v=2, where=torch.full((12,), 0.5))) == 3
    assert calls(masked("self", "bool"), swap) == 1
    assert calls(masked("self", "full"), swap) == 2
