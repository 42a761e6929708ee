"""`hookctl run --image`: a picture that is given is inverted and edited; what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from hookctl.cli import loading, main
from tests.recipes.pictures import PROMPT, TARGET, picture, pipeline

STACK = """
model = "shapes"
[run]
steps = 2
guidance = 3.0
[inversion]
recipe = "DirectInversion"
guidance = 3.0
[[editor]]
recipe = "PromptToPrompt"
blend = ["cat", "cat"]
"""
TEXTS = ["--prompt", PROMPT, "--edit", TARGET]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stack, a picture and a file that is none; the model is a tiny one."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipeline())
    (tmp_path / "stack.toml").write_text(STACK, "utf-8")
    picture().save(tmp_path / "picture.png")
    (tmp_path / "notes.png").write_text("no picture", "utf-8")
    whole = (tmp_path / "picture.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def test_a_picture_is_edited(files: Path) -> None:
    out = files / "out"
    given = [files / "stack.toml", *TEXTS, "--image", files / "picture.png", "--out", out]
    assert main(["run", *map(str, given), "--width", "128", "--height", "128"]) == 0
    assert {p.name for p in out.glob("*.png")} == {
        "grid.png",
        *(f"{name}-{i}.png" for name in ("plain", "edited") for i in range(2)),
    }
    run = json.loads((out / "run.json").read_text("utf-8"))
    assert run["inversion"] == {"recipe": "DirectInversion", "guidance": 3.0}
    assert run["image"] == str(files / "picture.png") and "inversion" in run["seconds"]
    assert "PromptToPrompt" in (out / "report.txt").read_text("utf-8")
    again, source = (Image.open(out / f"{name}-0.png") for name in ("plain", "edited"))
    assert ImageChops.difference(again, source).getbbox() is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "stack.toml edits a picture; give --image FILE"),
        (["--image", "none.png"], "none.png: there is no such file; give a picture"),
        (["--image", "notes.png"], "notes.png: can't be read as a picture"),
        (["--image", "cut.png"], "cut.png: can't be read as a picture"),
        (["--image", "picture.png", "--width", "64"], "--image is 128 x 128 px, and 64 x "),
        (["--image", "picture.png", "--images", "2"], "images = 2; an inverted picture takes none"),
        (["--image", "picture.png", "--negative", "x"], "negative = x; an inverted picture takes"),
    ],
)
def test_what_is_wrong_is_said(
    files: Path, capsys: pytest.CaptureFixture[str], options: list[Any], says: str
) -> None:
    given = [str(files / o) if o.endswith(".png") else o for o in options]
    status = main(["run", str(files / "stack.toml"), *TEXTS, *given, "--out", str(files / "out")])
    said = capsys.readouterr().err
    assert status == 2 and says in said and said.count("\n") == 1
    assert not list(files.glob("out/*.png"))


def test_a_stack_that_inverts_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(files / "picture.png")
    assert main(["run", "recolour", "--image", image, "--out", str(files / "out")]) == 2
    assert "draws from noise; give a stack with an [inversion] table" in capsys.readouterr().err
