"""Prompts that change on the way, on the command line and in a file."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from hookctl.cli import main

PROMPT, BEGUN = (
    "a red [circle:square:0.2] on a gray background",
    "a red circle on a gray background",
)
FEW = ["--model", "shapes", "--steps", "5"]


def different(a: Path, b: Path) -> bool:
    with Image.open(a) as one, Image.open(b) as other:
        return ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is not None


@pytest.mark.slow
def test_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    said, file, begun = tmp_path / "said", tmp_path / "file", tmp_path / "begun"
    assert main(["run", *FEW, "--prompt", PROMPT, "--out", str(said)]) == 0
    assert different(said / "plain-0.png", said / "edited-0.png")
    assert json.loads((said / "run.json").read_text("utf-8"))["prompts"] == [PROMPT]
    assert "changed the prompts" in (said / "report.txt").read_text("utf-8")
    stack = tmp_path / "stack.toml"
    stack.write_text(f'[run]\nprompt = "{PROMPT}"\n[[editor]]\nrecipe = "FreeU"\n', "utf-8")
    assert main(["run", str(stack), *FEW, "--out", str(file)]) == 0
    arguments = ["run", str(stack), *FEW, "--prompt", BEGUN, "--out", str(begun)]
    assert main(arguments) == 0
    assert not different(file / "plain-0.png", begun / "plain-0.png")
    assert different(file / "edited-0.png", begun / "edited-0.png")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", *FEW, "--prompt", "a [cat:dog:soon]"], "'soon' is no time; give a fraction"),
        (["run", "recolour", "--prompt", PROMPT, "--edit", "a [b:c:d:2]"], "give [from:to:when]"),
        (["maps", "shapes", "--prompt", PROMPT], f"is of one prompt; give '{BEGUN}'"),
        (["run", *FEW, "--prompt", r"a \[cat:dog:0.4\]"], "which stack?"),
    ],
)
def test_refusals(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) != 0
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
