"""The demo of real images on the flow-matching sibling: boxes, the vital block, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hookctl
from hookctl.demos import flow
from hookctl.demos.cases import draw
from hookctl.demos.inversion import images_of
from hookctl.demos.shapes.detect import detect
from hookctl.recipes.common.vital_layers import vital_sites


@pytest.fixture(scope="module")
def pipe() -> Any:
    return hookctl.load_shapes(flow=True)


def test_the_box_holds_the_edited_object_alone() -> None:
    rng = np.random.default_rng(3)
    cases = [draw("colour", rng) for _ in range(6)]
    for case, image in zip(cases, images_of(cases, rng), strict=True):
        left, top, right, bottom = (round(128 * edge) for edge in flow.box_of(image, case))
        found = detect(image)
        edited, other = found.find(*case.before[:2]), found.find(*case.other[:2])
        assert edited is not None and other is not None
        assert edited.mask[top:bottom, left:right].sum() == edited.mask.sum()
        assert not other.mask[top:bottom, left:right].any()


@pytest.mark.slow
def test_the_vital_block(pipe: Any) -> None:
    """That of Stable Flow is what the search finds."""
    rng = np.random.default_rng(1000)
    captions = [draw("colour", rng).source for _ in range(2)]
    assert vital_sites(pipe, captions, num_inference_steps=8, **flow.ARGUMENTS) == flow.VITAL


@pytest.mark.slow
def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole demo by the trained model: FlowEdit recolours, and keeps what it was not told of."""
    monkeypatch.setattr(flow, "METHODS", {"FlowEdit": flow.METHODS["FlowEdit"]})
    report = flow.run(tmp_path, seed=0, seeds=2)
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "report.json").is_file()
    figures = report["methods"]["FlowEdit"]
    assert figures["both"] == 1 and figures["background_psnr"] > 20
    assert report["autoencoder_psnr"] > 30


@pytest.mark.long
def test_every_method(tmp_path: Path) -> None:
    """Each changes the image, and no two the same way."""
    report = flow.run(tmp_path, seed=0, seeds=1)
    assert set(report["methods"]) == set(flow.METHODS)
    found = [figures["background_psnr"] for figures in report["methods"].values()]
    assert len(set(found)) == len(found)
