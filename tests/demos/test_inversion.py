"""The inversion demo: its images show what their prompts say, and its report adds up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hookctl.demos import inversion
from hookctl.demos.cases import draw
from hookctl.demos.figures import source_is_right
from hookctl.demos.shapes.detect import detect


def test_images_show_their_cases() -> None:
    rng = np.random.default_rng(3)
    cases = [draw("colour", rng) for _ in range(6)]
    images = inversion.images_of(cases, rng)
    for case, image in zip(cases, images, strict=True):
        assert source_is_right(case, detect(image))
    assert inversion.psnr(images[0], images[0]) == 100 > inversion.psnr(*images[:2])


@pytest.mark.slow
def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole demo: inversions and edits of a trained model, at as many steps as they need."""
    few = ("direct", "DDPM")
    monkeypatch.setattr(inversion, "METHODS", {name: inversion.METHODS[name] for name in few})
    report = inversion.run(tmp_path, seed=0, seeds=1)
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "report.json").is_file()
    for name in few:
        cost, figures = report["cost"][name], report["methods"][name]
        assert cost["rows_per_inversion"] == cost["rows_in_theory"]
        assert cost["peak_mib_of_an_image"] > 0
        assert abs(figures["behind_autoencoder"]) < 0.1  # both lead the source back exactly


@pytest.mark.slow
def test_on_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is led back on the flow-matching pipeline too."""
    monkeypatch.setattr(inversion, "ON_FLOW", {"direct": inversion.ON_FLOW["direct"]})
    report = inversion.run(tmp_path, seed=0, seeds=1, model="shapes-flow")
    cost, figures = report["cost"]["direct"], report["methods"]["direct"]
    assert report["model"] == "shapes-flow"
    assert cost["rows_per_inversion"] == cost["rows_in_theory"]
    assert abs(figures["behind_autoencoder"]) < 0.1
