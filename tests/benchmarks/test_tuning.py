"""Tuning of the launch tables, up to the GPU that it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hookctl.bench import tuning
from hookctl.bench.measure import OURS, Figure, Measured, check, measure
from hookctl.bench.workloads import WORKLOADS
from hookctl.cli import main
from hookctl.errors import UnsupportedError
from hookctl.kernels.common import launch_tables
from hookctl.kernels.common import wins as kernel_wins
from hookctl.kernels.common.launch import Launch
from hookctl.kernels.common.launch_tables import SINGLE

CPU = torch.device("cpu")


def test_candidates_surround_the_tile_that_ships() -> None:
    shipped = Launch(64, 32, 4, 2)
    found = tuning.candidates(shipped, WORKLOADS["map read-out"])
    assert found[0] == shipped and len(found) == len(set(found)) == 22
    assert {x.block_m for x in found} == {32, 64, 128} and {x.stages for x in found} == {1, 2, 3}
    whole = tuning.candidates(Launch(16, 256, 8, 1), WORKLOADS["sum of terms, up to 256 keys"])
    assert {(x.block_m, x.block_n, x.stages) for x in whole} == {(16, 256, 1), (32, 256, 1)}
    places = tuning.candidates(Launch(1, 128, 4, 1), WORKLOADS["latent mixing"])
    assert {(x.block_m, x.block_n, x.stages) for x in places} == {(1, 128, 1), (1, 256, 1)}


def test_every_table_has_a_workload() -> None:
    tables = launch_tables.shipped()
    assert set(WORKLOADS) <= set(tables)
    assert {name.removesuffix(SINGLE) for name in tables} == set(WORKLOADS)


def test_refused_without_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="--tune: .*run it on the GPU"):
        tuning.refuse(CPU, "--tune")
    for option, file in (("--tune", launch_tables.FILE), ("--wins", kernel_wins.FILE)):
        before = file.read_text()
        assert main(["bench", option, "--device", "cpu"]) != 0
        assert file.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("table", WORKLOADS)
def test_candidates_are_checked_and_timed(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every workload under another tile than that which ships, against its reference."""
    arch = "sm_80"
    key, shipped = max(
        (k, t) for k, t in launch_tables.shipped()[table][arch].items() if t is not None
    )
    other = Launch(32, shipped.block_n, 4, 1)
    monkeypatch.setattr(tuning, "candidates", lambda tile, work: [tile, other])
    one = tuning.contest(WORKLOADS[table], CPU, table, arch, key, shipped, small=True)
    assert set(one.tiles.values()) == {shipped, other} and OURS in one.tiles
    assert 0 < check(one.case) < one.case.tolerance


def test_the_winner_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same `measure` as the benchmark; nothing but the entry and its device changes."""
    table, key = "map read-out", (128,)
    shipped = launch_tables.shipped()[table]["sm_90"][key]
    assert shipped is not None
    other = Launch(32, 32, 4, 1)
    monkeypatch.setattr(tuning, "candidates", lambda tile, work: [tile, other])
    one = tuning.contest(WORKLOADS[table], CPU, table, "sm_90", key, shipped, small=True)
    found = measure(one.case, 0.0, CPU, 0.0)
    assert set(found.figures) == {OURS, "32x32 w4 s1"}

    def figures(ratio: float) -> Measured:
        of = {OURS: Figure(1, 1, 1, 0, None), "32x32 w4 s1": Figure(1, 1, 1, 0, ratio)}
        return Measured("tune", table, {}, of, 3, 0.0, 0.0)

    assert tuning.winner(one, figures(0.99)) == shipped
    assert tuning.winner(one, figures(0.90)) == other
    path = tmp_path / "launches.json"
    shutil.copy(launch_tables.FILE, path)
    said = tuning.written([(one, other)], "a device", path)
    assert said == ["map read-out, sm_90, 128: 64x64 w4 s2 -> 32x32 w4 s1"]
    tables, about = launch_tables.read(path)
    assert about["measured"] == {"map read-out, sm_90": "a device"}
    assert tables[table]["sm_90"].pop(key) == other
    expected = launch_tables.read()[0]
    expected[table]["sm_90"].pop(key)
    assert tables == expected
    assert "[32, 32, 4, 1]" in path.read_text() and json.loads(path.read_text())
