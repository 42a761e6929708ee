"""The Imagic demo: a run with next to no fitting, whose costs add up and whose images differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hookctl.demos import imagic

FEW: dict[str, Any] = {"text_steps": 1, "model_steps": 1, "schedule_steps": 4}


@pytest.mark.slow
def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole demo: the trained model is fitted, if briefly, for every start."""
    monkeypatch.setattr(imagic, "FIT", {**imagic.FIT, **FEW})
    monkeypatch.setattr(imagic, "STEPS", 4)
    monkeypatch.setattr(imagic, "ALPHAS", (0.0, 1.0))
    report = imagic.run(tmp_path, seed=0, seeds=1)
    assert all((tmp_path / name).is_file() for name in ("grid.png", "grid_alpha.png"))
    assert report["cost"]["rows_per_image"] == report["cost"]["rows_in_theory"]
    assert set(report["methods"]) == set(imagic.STARTS)
    back = {start: found["alpha 0"]["psnr"] for start, found in report["methods"].items()}
    assert min(report["autoencoder_psnr"], back["inverted noise"]) > back["random noise"]


def test_lines_run_from_left_to_right() -> None:
    figures = [{"edit_success": share, "kept": 1 - share} for share in (0.0, 1.0)]
    drawn = imagic.plot((0.0, 1.0), figures, "title")
    joined = imagic.side_by_side([drawn, drawn])
    assert joined.size == (2 * drawn.width, drawn.height)
    red, blue = (214, 39, 40), (31, 119, 180)
    heights = {c: _height(drawn, c, 60) for c in (red, blue)}
    assert heights[red] > heights[blue]  # success starts below what is kept, and ends above it
    heights = {c: _height(drawn, c, drawn.width - 60) for c in (red, blue)}
    assert heights[red] < heights[blue]


def _height(image: Any, colour: tuple[int, int, int], x: int) -> float:
    rows = [y for y in range(30, image.height) if image.getpixel((x, y)) == colour]
    return sum(rows) / len(rows)
