"""`hookctl run --image`: an image that is given is edited, drawn round or followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from hookctl.cli import loading, main
from tests.recipes.images import PROMPT, TARGET, image, pipeline

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
    """A folder with a stack, an image and a file that is none; the model is a tiny one."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipeline())
    (tmp_path / "stack.toml").write_text(STACK, "utf-8")
    image().save(tmp_path / "image.png")
    (tmp_path / "notes.png").write_text("no image", "utf-8")
    whole = (tmp_path / "image.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.slow
def test_a_image_is_edited(files: Path) -> None:
    out = files / "out"
    given = [files / "stack.toml", *TEXTS, "--image", files / "image.png", "--out", out]
    assert main(["run", *map(str, given), "--width", "128", "--height", "128"]) == 0
    assert {p.name for p in out.glob("*.png")} == {
        "grid.png",
        *(f"{name}-{i}.png" for name in ("plain", "edited") for i in range(2)),
    }
    run = json.loads((out / "run.json").read_text("utf-8"))
    assert run["inversion"] == {"recipe": "DirectInversion", "guidance": 3.0}
    assert run["image"] == str(files / "image.png") and "inversion" in run["seconds"]
    assert "PromptToPrompt" in (out / "report.txt").read_text("utf-8")
    again, source = (Image.open(out / f"{name}-0.png") for name in ("plain", "edited"))
    assert ImageChops.difference(again, source).getbbox() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "stack.toml takes an image; give --image FILE"),
        (["--image", "none.png"], "none.png: there is no such file; give an image"),
        (["--image", "notes.png"], "notes.png: can't be read as an image"),
        (["--image", "cut.png"], "cut.png: can't be read as an image"),
        (["--image", "image.png", "--width", "64"], "--image is 128 x 128 px, and 64 x "),
        (["--image", "image.png", "--images", "2"], "images = 2; an image that is inverted t"),
        (["--image", "image.png", "--negative", "x"], "negative = x; an image that is inverted"),
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
    image = str(files / "image.png")
    assert main(["run", "recolour", "--image", image, "--out", str(files / "out")]) == 2
    assert "draws from noise; give a stack with an [inversion] or a" in capsys.readouterr().err


GROWN = """
model = "shapes"
[run]
prompt = "a red cat"
steps = 4
guidance = 3.0
[program]
recipe = "SelectiveOneWay"
at = [64, 0]
image_size = [64, 64]
cycles = 1
"""
FITTED = """
model = "shapes"
[run]
prompt = "a blue cat"
steps = 2
guidance = 3.0
[program]
recipe = "Imagic"
alphas = [0.0, 1.0]
text_steps = 1
model_steps = 1
"""
FOLLOWED = """
model = "shapes"
[run]
prompt = "a red cat"
edit = "a dog"
steps = 2
[[editor]]
recipe = "ReferenceOnly"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "drawn", "acts"), [(GROWN, 1, "OneWayFlow"), (FOLLOWED, 2, "ReferenceOnly")]
)
def test_a_image_is_drawn_round_or_followed(files: Path, stack: str, drawn: int, acts: str) -> None:
    (files / "stack.toml").write_text(stack, "utf-8")
    given = [files / "stack.toml", "--image", files / "image.png", "--out", files / "out"]
    assert main(["run", *map(str, given), "--width", "128", "--height", "128"]) == 0
    for i in range(drawn):
        plain, edited = (Image.open(files / f"out/{name}-{i}.png") for name in ("plain", "edited"))
        assert plain.size == edited.size == (128, 128)
        assert ImageChops.difference(plain, edited).getbbox() is not None
    assert acts in (files / "out/report.txt").read_text("utf-8")
    program = json.loads((files / "out/run.json").read_text("utf-8"))["program"]
    assert (program is not None) == (stack is GROWN)
    assert len(list(files.glob("out/edited-*.png"))) == drawn


@pytest.mark.slow
def test_a_program_may_draw_several(files: Path) -> None:
    """Each is written, and stands in the grid beside the image and the plain one."""
    (files / "stack.toml").write_text(FITTED, "utf-8")
    given = [files / "stack.toml", "--image", files / "image.png", "--out", files / "out"]
    size = ["--width", "128", "--height", "128"]
    assert main(["run", *map(str, given), "--words", "cat", *size]) == 0
    made = sorted(path.name for path in files.glob("out/*-*.png"))
    assert made == ["edited-0.png", "edited-1.png", "plain-0.png"]
    grid = Image.open(files / "out/grid.png")
    assert grid.width > 5 * grid.height * 0.7  # image, plain, two edited and a map, in one row


@pytest.mark.parametrize(
    ("stack", "options", "says"),
    [
        (GROWN, ["--edit", "a dog"], "edit = 'a dog'; SelectiveOneWay takes one prompt"),
        (GROWN, ["--images", "2"], "images = 2; an image that is a program's takes none"),
        (FITTED, ["--negative", "dark"], "negative = 'dark'; Imagic takes none, so leave it out"),
        (FITTED, ["--width", "96", "--height", "96"], "and 96 x 96 are drawn"),
        (GROWN, ["--width", "96", "--height", "96"], "on a canvas of 96 x 96"),
        (FOLLOWED, ["--width", "96", "--height", "96"], "and 96 x 96 are drawn"),
    ],
)
def test_what_is_wrong_beside_an_image_is_said(
    files: Path, capsys: pytest.CaptureFixture[str], stack: str, options: list[str], says: str
) -> None:
    (files / "stack.toml").write_text(stack, "utf-8")
    given = [files / "stack.toml", "--image", files / "image.png", "--out", files / "out"]
    assert main(["run", *map(str, given), *options]) == 2
    assert says in capsys.readouterr().err and not list(files.glob("out/*.png"))
