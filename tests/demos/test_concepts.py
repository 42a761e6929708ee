"""The demo of ConceptAttention: what its figures mean, and a run of few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hookctl.demos import concepts
from hookctl.demos.shapes.detect import detect
from hookctl.demos.shapes.render import drawn
from hookctl.demos.shapes.world import Scene, Thing


def test_agreement() -> None:
    image = drawn([Scene((Thing("square", "red", "plain", "large", (64, 64)),), "white")])[0]
    found = detect(image).find("square", "red")
    assert found is not None
    mask = torch.from_numpy(found.mask)
    assert concepts.agreement(mask, found) == {"iou_at_mean": 1.0, "iou_at_best": 1.0}
    away = concepts.agreement(~mask, found)
    assert away["iou_at_mean"] == 0 == away["iou_at_best"]
    cells = concepts.in_cells(found.mask, 8, 8)
    assert cells.shape == (8, 8) and float(cells.mean()) == pytest.approx(found.mask.mean())
    coarse = concepts.agreement(cells, found)
    assert 0.4 < coarse["iou_at_mean"] <= coarse["iou_at_best"] < 1


def test_overlap() -> None:
    a, b = np.eye(4, dtype=bool), np.ones((4, 4), bool)
    assert concepts.overlap(a, b) == 0.25 and concepts.overlap(~b, ~b) == 0


@pytest.mark.slow
def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At as few steps as an image of one object needs."""
    monkeypatch.setattr(concepts, "STEPS", 10)
    report = concepts.run(tmp_path, seed=0, seeds=1)
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "report.json").is_file()
    assert report["cases_with_right_image"] == 1
    assert report["rows_per_image"] == report["rows_in_theory"]
    kinds = report["methods"]
    ways = (concepts.CONCEPTS, concepts.SUITED, concepts.ATTENTION, concepts.LOOKED_AT)
    assert list(kinds) == [*ways, concepts.TRUTH]
    for figures in kinds.values():
        assert 0 <= figures["iou_at_mean"] <= figures["iou_at_best"] <= 1
    assert kinds[concepts.ATTENTION]["iou_at_mean"] > 0
