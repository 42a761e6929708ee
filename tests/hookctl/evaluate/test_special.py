"""Which calls go to kernels of their own."""

from __future__ import annotations

import pytest

from hookctl.evaluate import special
from hookctl.kernels import wins
from tests.hookctl.evaluate.verbs import masked, scripts


def test_the_table_says_where_kernels_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows of one softmax and by kinds of regions; an entry serves what lies between it and the
    next."""
    monkeypatch.setattr(wins, "arch_of", lambda device: "sm_90")
    case = masked("self", "none", heads=1)
    known = scripts(case)
    call = case.call()
    known["borrow qk (P2P)"](call)
    finished = call.fold()
    assert list(special.sharing(finished, range(5)).values()) == [[2, 3, 4]]
    restricted = case.call()
    known["restrict"](restricted)
    assert special.suits(call, finished) is None  # 12 keys
    assert special.suits(restricted, restricted.fold()) is None

    def table(of_arch: dict[int, int | None]) -> None:
        kernels = (wins.SHARED, wins.REGIONS)
        monkeypatch.setattr(wins, "_shipped", {kernel: {"sm_90": of_arch} for kernel in kernels})

    table({4: 12})  # the call has 3 rows of one softmax, the other 6 kinds of queries
    assert special.suits(call, finished) is None
    assert "6 kinds of queries" in (special.suits(restricted, restricted.fold()) or "")
    table({2: 12, 4: None})
    assert "3 rows of one softmax" in (special.suits(call, finished) or "")
    assert special.suits(restricted, restricted.fold()) is None
    table({2: 13})
    assert special.suits(call, finished) is None
