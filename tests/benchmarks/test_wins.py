"""Where kernels are taken in place of SDPA, up to the GPU that it is measured on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hookctl.bench import wins
from hookctl.bench.calls import Bench
from hookctl.bench.measure import OURS, Figure, Measured, check
from hookctl.kernels.common import wins as table
from hookctl.kernels.common.wins import MAPS, REGIONS, SHARED, TERMS

CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_entry_has_a_case_whose_forms_agree() -> None:
    bench = Bench(CPU, torch.float32, 0.0, flex=False)
    asked = list(wins.questions(bench, sizes=(16,), heads=((1, 16),)))
    counts = {kernel: [q.count for q in asked if q.kernel == kernel] for kernel in table.read()[0]}
    assert counts == {TERMS: [2, 2], SHARED: [2, 4, 8], REGIONS: [2, 4, 8], MAPS: [1]}
    for one in asked:
        assert set(one.case.forms) == {OURS, wins.SDPA} and one.tokens == 16
        assert check(one.case) <= one.case.tolerance
    assert {q.kernel for q in wins.questions(bench, MAPS, sizes=(16,), heads=((1, 16),))} == {MAPS}


def test_a_kernel_must_win_at_every_larger_size_and_width() -> None:
    bench = Bench(CPU, torch.float32, 0.0, flex=False)
    (question,) = wins.questions(bench, MAPS, sizes=(16,), heads=((1, 16),))

    def measured(ratio: float) -> Measured:
        figures = {OURS: Figure(1, 1, 1, 0, None), wins.SDPA: Figure(1, 1, 1, 0, ratio)}
        return Measured(MAPS, "map capture", {}, figures, 3, 0.0, 0.0)

    def fewest(*ladder: tuple[int, float]) -> int | None:
        asked = [(replace(question, tokens=n), measured(ratio)) for n, ratio in ladder]
        return wins.answers(asked)[MAPS, 1]

    assert fewest((64, 1.5), (256, 0.9), (1024, 1.3), (4096, 1.2)) == 1024
    assert fewest((64, 1.5), (256, 1.3)) == 64
    assert fewest((64, 1.5), (256, 1.01)) is None  # faster, but within the margin
    assert fewest((64, 1.5), (64, 0.9), (256, 1.3)) == 256
    alone = replace(measured(1.0), figures={OURS: Figure(1, 1, 1, 0, None)})
    assert wins.answers([(question, alone)]) == {(MAPS, 1): 16}  # SDPA has no memory for it
    assert wins.answers([(question, None)]) == {(MAPS, 1): None}


def test_only_what_was_measured_is_written(tmp_path: Path) -> None:
    path = tmp_path / "wins.json"
    shutil.copy(table.FILE, path)
    said = wins.written({(SHARED, 4): None, (SHARED, 2): 256}, "sm_90", "a device", path)
    assert said == [
        "shared probabilities, 2 or more: from 256 tokens on",
        "shared probabilities, 4 or more: SDPA everywhere",
    ]
    after, about = table.read(path)
    assert about["measured"] == {"shared probabilities, sm_90": "a device"}
    assert after[SHARED].pop("sm_90") == {2: 256, 4: None}
    before = table.read()[0]
    before[SHARED].pop("sm_90")
    assert after == before
