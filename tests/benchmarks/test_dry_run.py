"""The benchmark as it runs on a GPU, without one: real sizes, every form, every launch."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.bench import calls, kernels, tuning
from hookctl.bench.calls import SHAPES, Bench, most_bytes
from hookctl.bench.measure import OURS, PLAIN, Case, _agreeing
from hookctl.bench.workloads import WORKLOADS
from hookctl.cli import bench as command
from hookctl.cli import bench_steps, main
from hookctl.kernels.common import launch_tables
from hookctl.kernels.common.launch import Launch
from hookctl.kernels.common.launch_tables import SINGLE
from tests.benchmarks.pretended import ARCHS, DEVICE, Seen, pretended
from tests.marks import examples

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no pretence"),
    pytest.mark.slow,  # every launch of every form at real sizes, traced on fake tensors
]

FUSED = (OURS, "plan triton", "kernel")
# The others differ by their tables alone, whose every entry is compiled by tests/kernels.
EVERY_ARCH = pytest.mark.parametrize("arch", examples(ARCHS, ["sm_90"]))


def bench() -> Bench:
    return Bench(DEVICE, torch.bfloat16, most_bytes(DEVICE), flex=False)


def given(self: Bench, rows: int, n: int, m: int, heads: int, d: int) -> list[Tensor]:
    """As `Bench.given` has it, without the numbers."""
    found = (torch.empty(rows, t, heads * d, device=DEVICE, dtype=self.dtype) for t in (n, m, m))
    return [x.unflatten(-1, (heads, d)).transpose(1, 2) for x in found]


def copied(case: Case, name: str, seen: Seen) -> int:
    """Tensors that the host hands over, and numbers that it waits for, in a run after the first."""
    with case.within(name):
        case.forms[name]()
        seen.copied.clear()
        seen.waits = 0
        case.forms[name]()
    return len(seen.copied) + seen.waits


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hookctl bench`: figures of all forms, table and plot."""
    monkeypatch.setattr(calls, "SHAPES", {"SDXL-1024": SHAPES["SDXL-1024"][1:]})
    monkeypatch.setattr(calls, "DENSITIES", ((4, 0.5),))
    monkeypatch.setattr(command, "GROUPS", ("calls", "kernels"))
    arguments = ["bench", "--seconds", "1e-9", "--only", "re", "--out", str(tmp_path)]
    with pretended("sm_90"):
        assert main(arguments) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["name"] == "no sm_90" and found["dtype"] == "bfloat16" and not found["failed"]
    forms = {case["name"]: set(case["figures"]) for case in found["cases"]}
    assert {"plan triton", "plan sdpa", "eager", "sdpa per term", PLAIN} <= forms["P2P refine"]
    assert {"plan triton", "eager", "dense mask"} <= forms["regions"]
    assert {OURS, "eager"} == forms["RealCompo mixture"] == forms["map capture"]
    assert all(f["host"] > 0 for case in found["cases"] for f in case["figures"].values())
    assert (tmp_path / "bench.png").stat().st_size


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_beside_attention(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "given", given)
    with pretended(arch) as seen, torch.no_grad():
        cases = list(kernels.cases(bench(), quick=False))
        forms = {case.name: set(_agreeing(case)[0]) for case in cases}
    assert {OURS, "eager", "kernel"} == forms["map gradient"]
    assert {OURS, "sdpa"} == forms["one term, long keys"]
    mixing = {"_update_kernel", "_blend_kernel", "_merge_kernel", "_mix_kernel", "_forward_kernel"}
    assert {"_long", "_forward", "_of_keys", "_of_queries", *mixing} == seen.kernels


@EVERY_ARCH
def test_launches_for_every_head(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are given, for heads of every width, in the tiles of every chip."""
    monkeypatch.setattr(Bench, "given", given)
    with pretended(arch) as seen, torch.no_grad():
        few, shapes = bench(), {s[2]: s for of in SHAPES.values() for s in of}.values()
        cases = [case for s in shapes for case in few.cross_cases(s)]
        cases += [case for s in shapes for case in few.self_cases(s, ((4, 0.5),))]
        cases += few.scaling(256, 1, 8)
        cases += few.self_cases(SHAPES["SDXL-2048"][0], ((8, 1.0),))
        for case in cases:
            for name in FUSED:
                if name in case.forms:
                    assert case.sample(case.forms[name]()).device == DEVICE
    assert {"_short", "_forward"} == seen.kernels


def test_no_form_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what is timed is how long the host takes to come back."""
    monkeypatch.setattr(Bench, "given", given)
    with pretended("sm_90") as seen, torch.no_grad():
        few = bench()
        for shape in ((4096, 10, 64), (64, 8, 160)):
            for case in (*few.cross_cases(shape), *few.self_cases(shape, ((4, 0.5),))):
                assert {n: copied(case, n, seen) for n in case.forms} == dict.fromkeys(
                    case.forms, 0
                )


def test_calls_alike_launch_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same edit made again asks for the same launches."""
    monkeypatch.setattr(Bench, "given", given)
    with pretended("sm_90") as seen, torch.no_grad():
        few = bench()
        for case in (*few.cross_cases((1024, 20, 64)), *few.self_cases((64, 8, 160), ((4, 0.5),))):
            for name in {OURS, "plan triton", "plan sdpa"} & set(case.forms):
                runs = []
                for _ in range(2):
                    seen.launches.clear()
                    case.forms[name]()
                    runs.append(list(seen.launches))
                assert runs[0] == runs[1], (case.name, name)


@pytest.mark.long
def test_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an SDXL UNet with its largest attention alone: edits in every form, with the gradient."""
    fewer = {
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": (5, 10),
    }
    fewer |= {"block_out_channels": (320, 640)}
    fewer |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    fewer |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    monkeypatch.setitem(bench_steps.OPTIONS, "SDXL", bench_steps.OPTIONS["SDXL"] | fewer)
    with pretended("sm_90") as seen, torch.no_grad():
        model = bench_steps.Model("SDXL", bench(), 64)
        cases = [
            model.edited("P2P", model.prompt_to_prompt),
            model.edited("masked self-attention", partial(model.regions, 4), 4),
            model.edited("adapter", model.adapter),
            model.captured("energy gradient", energy=True),
        ]
        for case in cases:
            forms, _ = _agreeing(case)
            assert set(forms) == {OURS, "eager", PLAIN} and case.flops > 1e12
        # The time of the step is a number, and every step hands it over.
        assert copied(cases[1], OURS, seen) <= 1
    assert {"_short", "_forward"} <= seen.kernels


@EVERY_ARCH
def test_every_entry_can_be_tuned(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those that no call can take, since another table has nothing for it."""
    monkeypatch.setattr(tuning, "candidates", lambda tile, work: [tile])
    with pretended(arch) as seen, torch.no_grad():
        found = list(tuning.contests(DEVICE, arch, small=True))
        for one in found:
            assert set(_agreeing(one.case)[0]) == set(one.tiles) == {OURS}
    of_terms = {"queries_kernel", "keys_kernel", "overlaps_kernel"}
    assert {*of_terms, "_of_queries", "_of_keys"} <= seen.kernels
    shipped = launch_tables.shipped()
    listed = {(t, key) for t in shipped for key, tile in shipped[t].get(arch, {}).items() if tile}
    left = listed - {(one.table, one.key) for one in found}
    assert all(WORKLOADS[table.removesuffix(SINGLE)].needs for table, _ in left) and len(left) < 8


class Inline:
    """A pool of processes that is this one."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, run: Any, *given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(run(*given))
        return done


def test_tuning_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hookctl bench --tune`, on a copy of the tables; all candidates are as fast as each other."""
    path, before = tmp_path / "launches.json", launch_tables.FILE.read_text()
    shutil.copy(launch_tables.FILE, path)
    monkeypatch.setattr(tuning, "written", partial(tuning.written, path=path))
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Inline)
    arguments = ["bench", "--tune", "--only", "latent", "--seconds", "1e-9", "--out", str(tmp_path)]
    with pretended("sm_90") as seen:
        assert main(arguments) == 0
    assert len({tile for _, tile in seen.launches}) == 6  # each before it is measured
    assert launch_tables.read(path)[1]["measured"] == {
        "latent mixing, sm_90": "no sm_90", "latent mixing, fp32, sm_90": "no sm_90",
    }  # fmt: skip
    assert launch_tables.read(path)[0] == launch_tables.shipped()
    assert launch_tables.FILE.read_text() == before
    assert len(json.loads((tmp_path / "tuning.json").read_text())) == 2


def test_what_can_not_be_compiled_is_prepared_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(table: str, tile: Launch, make: Any) -> Any:
        def run() -> None:
            if tile.warps == 8:
                raise RuntimeError("PassManager::run failed")

        return run

    monkeypatch.setattr(tuning, "_form", form)
    tiles = [Launch(1, 256, warps, 1) for warps in (4, 8)]
    entry = "latent mixing", "sm_90", ()
    assert tuning.prepared(torch.device("cpu"), *entry, tiles, small=True) == 1


def test_a_case_that_fails_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def case(name: str, form: Any) -> Case:
        return Case("call", name, {"tokens": 1}, {OURS: form}, lambda: torch.ones(1))

    cases = [case("wrong", lambda: torch.zeros(1)), case("right", lambda: torch.ones(1))]
    monkeypatch.setattr(command, "_cases", lambda bench, options: cases)
    assert main(["bench", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "call: right" in said.out and "call: wrong" not in said.out
    assert "1 cases have no figures" in said.err and "1.0e+00 from the reference" in said.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [x["name"] for x in found["cases"]] == ["right"] and len(found["failed"]) == 1


def test_a_form_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def large() -> Tensor:
        raise torch.OutOfMemoryError("40 GiB")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    forms = {OURS: lambda: torch.ones(1), "eager": large}
    one = Case("call", "name", {}, forms, lambda: torch.ones(1))
    assert set(_agreeing(one)[0]) == {OURS}
    with pytest.raises(torch.OutOfMemoryError):
        _agreeing(Case("call", "name", {}, {OURS: large}, lambda: torch.ones(1)))
