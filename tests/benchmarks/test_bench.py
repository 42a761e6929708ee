"""The benchmark itself: it refuses wrong results, and what it prints is what it measured."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from hookctl.bench import kernels, report
from hookctl.bench.calls import Bench
from hookctl.bench.edits import cross, density, regions_of, self_replacement
from hookctl.bench.limits import Limits
from hookctl.bench.measure import OURS, PLAIN, Case, DisagreementError, Held, check, measure
from hookctl.cli import bench_learned, bench_peers, bench_steps
from hookctl.evaluate import plan

CPU = torch.device("cpu")


def bench(dtype: torch.dtype = torch.float32) -> Bench:
    return Bench(CPU, dtype, 1e9, flex=False)


@pytest.mark.slow  # every form of every edit
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


def test_every_kernel_of_its_own_agrees_with_float64() -> None:
    few = bench()
    cases = [kernels.map_gradient(few, (36, 2, 16), of_self) for of_self in (False, True)]
    cases += [*kernels.mixing(few, 16), kernels.gain(few, 6, 9), kernels.gain(few, 3, 16)]
    assert {case.name for case in cases} == {
        "map gradient", "local blend", "merge by paste", "merge by mean", "RealCompo mixture",
        "RealCompo update",
        "Fourier gain",
    }  # fmt: skip
    for case in cases:
        assert {OURS, "eager"} == set(case.forms)
        assert check(case) < case.tolerance and case.traffic > 0
    halves = bench(torch.bfloat16)
    for case in (kernels.map_gradient(halves, (36, 2, 16), False), kernels.gain(halves, 6, 9)):
        assert 0 < check(case) < case.tolerance


def test_a_wrong_form_gives_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench().case("self-replacement", self_replacement(), (16, 1, 8))
    evaluate = plan.evaluate
    monkeypatch.setattr(plan, "evaluate", lambda call, *more: (evaluate(call)[0] * 1.01, more))
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
    small, image = report.plot([one]), report.plot([one] * 60, "a device")
    assert small.width < image.width and image.getextrema() == ((0, 255),) * 3
    red = {(200, 16, 46)}
    assert red <= {colour for _, colour in image.getcolors(image.width * image.height) or []}


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
    assert density(regions_of(64, 4, 1.0)) == pytest.approx(0.25)
    assert density(regions_of(64, 1, 1.0)) == 1.0
    limits = Limits(2.0, 4.0)
    assert limits.seconds(4.0, 4.0) == 2.0 and limits.seconds(0.0, 8.0) == 2.0


def test_the_same_edit_in_half_precision() -> None:
    case = bench(torch.float16).case("P2P refine", cross("refine", CPU), (32, 2, 16))
    assert check(case) < case.tolerance


@pytest.mark.slow
def test_the_work_of_a_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations of a small UNet: what is not attention once, attention by its sizes."""
    tiny = dict(bench_steps.OPTIONS["reduced SD1.5"], block_out_channels=(32, 32, 32, 32))
    monkeypatch.setitem(bench_steps.OPTIONS, "reduced SD1.5", tiny)
    model = bench_steps.Model("reduced SD1.5", bench(), 16)
    assert len(model.attention) == 32 and model.attention[0][:4] == (4, 4, 256, 256)
    attention = sum(4.0 * r * h * n * m * d for r, h, n, m, d, _ in model.attention)
    plain, traffic = model.work(lambda *_: None)
    assert plain == model.products + attention
    assert traffic == 4 * sum(x.numel() for x in model.unet.parameters())
    edited, _ = model.work(model.prompt_to_prompt)
    assert model.products < edited < plain
    assert model.work(lambda *_: None, energy=True)[0] == 2 * model.products + 3 * attention
    # The first convolution alone: 4 rows, 16 x 16 places, 4 x 9 inputs, 32 outputs, twice.
    assert model.products > 2 * 4 * 256 * 36 * 32
    case = model.captured("map capture", energy=False)
    assert case.flops == plain and check(case) < case.tolerance


def test_what_lets_nothing_watch_it_is_timed_all_the_same() -> None:
    """FlexAttention refuses every mode of operators; and it is warm when it is timed."""
    runs = 0

    def unwatched() -> Tensor:
        nonlocal runs
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise NotImplementedError("no rule registered for the operator")
        runs += 1
        return torch.ones(1)

    forms = {OURS: lambda: torch.ones(1), "flex": unwatched}
    one = measure(Case("g", "n", {}, forms, lambda: torch.ones(1)), 0.0, CPU, 0.0)
    assert one.figures["flex"].peak is None and runs == 3 + one.rounds
    assert "flex" in report.text([one])


@pytest.mark.long  # whole runs of every peer
def test_the_peers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dict(bench_steps.OPTIONS["reduced SD1.5"], block_out_channels=(32, 32, 32, 32))
    monkeypatch.setitem(bench_steps.OPTIONS, "reduced SD1.5", tiny)
    monkeypatch.setattr(bench_peers, "STEPS", 1)
    found = {}
    with torch.no_grad():
        for case in bench_peers.cases(bench(), quick=True):
            found[case.name] = set(case.forms) - {OURS, PLAIN}
            check(case)
    assert found == {
        "masked self-attention": set(), "P2P": {"controller"}, "regional prompts": {"by hand"},
        "maps": set(), "PAG": {"diffusers"}, "FreeU": {"diffusers"}, "panorama": {"diffusers"},
    }  # fmt: skip
    assert set(bench_peers.absent()) <= {"attention-map-diffusers", "daam"}


@pytest.mark.long  # whole runs of four pairs, whose numbers tests/hookctl/learned compares too
def test_trained_modules_agree_with_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dict(bench_steps.OPTIONS["reduced SD1.5"], block_out_channels=(32, 32, 32, 32))
    monkeypatch.setitem(bench_steps.OPTIONS, "reduced SD1.5", tiny)
    peers = {}
    with torch.no_grad():
        for case in bench_learned.cases(bench(), quick=True):
            [peers[case.name]] = set(case.forms) - {OURS, PLAIN}
            assert check(case) < 1e-4
            with case.within(PLAIN):
                plain = case.forms[PLAIN]()
            assert float((plain - case.truth()).norm() / plain.norm()) > 1e-3, "it does nothing"
    assert peers == {
        "GLIGEN (insert)": "diffusers",
        "IP-Adapter (term)": "diffusers",
        "InstantID (term, residuals)": "diffusers",
        "Collaborative Diffusion": "by hand",
    }
