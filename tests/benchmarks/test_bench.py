"""The benchmark itself: it refuses wrong results, and what it prints is what it measured."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from hookctl.attention import plan
from hookctl.bench import report
from hookctl.bench.calls import Bench
from hookctl.bench.edits import cross, density, regions_of, self_replacement
from hookctl.bench.limits import Limits
from hookctl.bench.measure import OURS, PLAIN, Case, DisagreementError, Held, check, measure

CPU = torch.device("cpu")


def bench(dtype: torch.dtype = torch.float32) -> Bench:
    return Bench(CPU, dtype, 1e9, flex=False)


def test_every_form_of_every_edit_agrees_with_float64() -> None:
    shape = (64, 2, 16)
    cases = [*bench().cross_cases(shape), *bench().self_cases(shape, ((2, 1.0), (3, 0.5)))]
    assert {case.name for case in cases} == {
        "P2P replace", "P2P refine", "P2P reweight", "adapter", "map capture", "self-replacement",
        "regions",
    }  # fmt: skip
    for case in cases:
        assert {OURS, "eager"} <= set(case.forms)
        assert 0 < check(case) < case.tolerance


def test_a_wrong_form_gives_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench().case("self-replacement", self_replacement(), (16, 1, 8))
    evaluate = plan.evaluate
    monkeypatch.setattr(plan, "evaluate", lambda call, b="auto": (evaluate(call, b)[0] * 1.01, b))
    with pytest.raises(DisagreementError, match="no figures"):
        measure(case, 0.0, CPU, 0.0)


def test_figures_of_known_forms() -> None:
    def slow() -> Tensor:
        stop = time.process_time() + 0.01
        while time.process_time() < stop:
            pass
        return torch.ones(1)

    def slower() -> Tensor:
        return slow() + slow() - 1

    forms = {OURS: slow, "eager": slower, PLAIN: slow}
    case = Case("group", "name", {"tokens": 4}, forms, lambda: torch.ones(1))
    one = measure(case, 1e-3, CPU, 0.0)
    ratio = one.figures["eager"].per_ours
    assert ratio is not None and 1.5 < ratio < 3.0 and one.rounds >= 3
    assert one.figures[OURS].low <= one.figures[OURS].seconds <= one.figures[OURS].high
    table = report.rows([one])
    assert [row[2] for row in table] == [OURS, "eager", PLAIN]
    image = report.plot([one, one])
    assert image.getextrema() != ((255, 255),) * 3


def test_peaks_count_what_lives_at_once() -> None:
    x = torch.ones(1000)
    with Held() as held:
        a = x * 2
        b = a + 1
        del a
        c = b + b
        c.view(10, 100)
    assert held.peak == 8000


def test_densities_and_limits() -> None:
    assert density(regions_of(64, 4, 1.0, CPU)) == pytest.approx(0.25)
    assert density(regions_of(64, 1, 1.0, CPU)) == 1.0
    limits = Limits(2.0, 4.0)
    assert limits.seconds(4.0, 4.0) == 2.0 and limits.seconds(0.0, 8.0) == 2.0


def test_the_same_edit_in_half_precision() -> None:
    case = bench(torch.float16).case("P2P refine", cross("refine", CPU), (32, 2, 16))
    assert check(case) < case.tolerance
