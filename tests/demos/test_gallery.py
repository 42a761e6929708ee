"""`hookctl demo all` and the gallery page, with demos that draw nothing real."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hookctl.cli import demo as cli
from hookctl.cli import main
from hookctl.demos import DEMOS, gallery
from hookctl.errors import InputError

REPORT = {
    "demo": "first",
    "seed": 3,
    "scales": [1, 2],
    "kinds": {"colour": {"edit": {"success": 0.5}, "cases": 4}, "shape": {"cases": None}},
    "cost": {"denoiser_calls": 25, "theory": 25},
}


def noise(size: tuple[int, int]) -> Image.Image:
    """The image that compresses worst."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def demos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three demos: the second fails, the first and the third write an image."""

    def run(out: Path, seed: int, seeds: int, progress: Any) -> dict[str, Any]:
        progress(seeds, seeds)
        noise((64, 48)).save(out / "grid.png")
        (out / "report.json").write_text(json.dumps(REPORT))
        return REPORT

    def fail(**_: Any) -> None:
        raise RuntimeError("no\nluck")

    for name in list(DEMOS):
        monkeypatch.delitem(DEMOS, name)
    for name, function in {"first": run, "second_one": fail, "third": run}.items():
        monkeypatch.setitem(DEMOS, name, f"what the {name} shows")
        monkeypatch.setitem(sys.modules, f"hookctl.demos.{name}", SimpleNamespace(run=function))


def test_a_demo_that_fails_stops_no_other(
    demos: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "all", "--out", str(tmp_path), "--seed", "3", "--no-progress"]) == 1
    err = capsys.readouterr().err
    assert "second_one failed: RuntimeError: no luck" in err
    assert "1 of 3 demos failed: second_one" in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["demos"] == {"first": REPORT, "third": REPORT} and report["seed"] == 3
    assert report["failed"] == {"second_one": "RuntimeError: no luck"}
    page = (tmp_path / "gallery.md").read_text()
    assert page.index("## First") < page.index("## Second one") < page.index("## Third")
    assert "**Failed**: RuntimeError: no luck" in page
    assert "What the first shows." in page and "![first](first/grid.png)" in page
    assert "| kinds | colour | shape |" in page and "| edit: success | 0.5 |  |" in page
    assert "| cost | denoiser calls | theory |" in page and "seed 3; scales 1, 2" in page


def test_all_well(demos: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DEMOS, "second_one")
    assert main(["demo", "all", "--out", str(tmp_path), "--no-progress"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["failed"] == {}


def test_the_small_gallery(demos: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, to = tmp_path / "out", tmp_path / "gallery"
    main(["demo", "all", "--out", str(source), "--no-progress"])
    noise((1500, 1200)).save(source / "first" / "grid-more.png")
    capsys.readouterr()
    assert gallery.main(["--from", str(source), "--to", str(to)]) == 1
    assert "for want of a report: second_one" in capsys.readouterr().err
    assert sorted(p.name for p in to.iterdir()) == ["first-more.jpg", "first.jpg", "third.jpg"]
    assert all(p.stat().st_size <= gallery.LARGEST for p in to.iterdir())
    assert Image.open(to / "first.jpg").size == (64, 48)
    assert "![first](gallery/first-more.jpg)" in (tmp_path / "gallery.md").read_text()


def test_flow_beside(demos: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a demo drew on the flow-matching pipeline stands below what it drew on the other."""
    source, flow, to = tmp_path / "out", tmp_path / "flow", tmp_path / "gallery"
    main(["demo", "all", "--out", str(source), "--no-progress"])
    (flow / "first").mkdir(parents=True)
    noise((32, 32)).save(flow / "first" / "grid.png")
    (flow / "first" / "report.json").write_text(json.dumps({**REPORT, "seed": 8}))
    gallery.main(["--from", str(source), "--flow", str(flow), "--to", str(to)])
    assert sorted(p.name for p in to.iterdir()) == ["first.jpg", "first_flow.jpg", "third.jpg"]
    page = (tmp_path / "gallery.md").read_text()
    assert page.count("On the flow-matching pipeline") == 1
    marks = ("(gallery/first.jpg)", "seed 3", "first_flow.jpg", "seed 8", "## Third")
    places = [page.index(mark) for mark in marks]
    assert places == sorted(places)


def test_all_of_the_flow_matching_pipeline(
    demos: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it draws, told which pipeline where they have both."""
    models = []

    def run(model: str = "", **given: Any) -> dict[str, Any]:
        models.append(model)
        noise((8, 8)).save(given["out"] / "grid.png")
        return REPORT

    monkeypatch.setattr(cli, "ON_BOTH", ("first",))
    monkeypatch.setattr(cli, "OF_FLOW", ("third",))
    for name in ("first", "third"):
        monkeypatch.setitem(sys.modules, f"hookctl.demos.{name}", SimpleNamespace(run=run))
    assert main(["demo", "all", "--model", "shapes-flow", "--out", str(tmp_path)]) == 0
    assert models == ["shapes-flow", ""]
    assert "second_one" not in (tmp_path / "gallery.md").read_text()


def test_images_share_the_room(demos: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gallery, "ALTOGETHER", 60_000)
    noise((600, 400)).save(tmp_path / "grid.png")
    noise((600, 400)).save(tmp_path / "grid-2.png")
    gallery.write_small(tmp_path / "g", [gallery.Shown.of("first", REPORT, tmp_path)])
    assert sum(p.stat().st_size for p in (tmp_path / "g").iterdir()) <= 60_000


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no report of a demo; run `hookctl demo all"):
        gallery.main(["--from", str(tmp_path)])
