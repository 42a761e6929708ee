"""What the README says can be pasted, and what the documents point to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import hookctl
from hookctl.cli import parser
from hookctl.errors import ConflictError
from hookctl.recipes import MasaCtrl, PromptToPrompt
from tests.imports.pages import ROOT, blocks, check_links, paste

README, CARD = ROOT / "README.md", ROOT / "demos/shapes/weights/README.md"
FLOW_CARD = ROOT / "demos/shapes/flow/weights/README.md"
PAGES = [
    README,
    CARD,
    FLOW_CARD,
    ROOT / "CHANGELOG.md",
    ROOT / "demos/gallery.md",
    *ROOT.glob("docs/*.md"),
]


def commands() -> list[list[str]]:
    """Every line of the README's shell blocks as words, without its comment."""
    text = "\n".join(blocks(README, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The names that the README's Python defines, and the folder that it wrote to."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return paste(README), folder


def test_python_runs_as_it_stands(pasted: tuple[dict[str, Any], Path]) -> None:
    names, folder = pasted
    assert {path.name for path in folder.iterdir()} == {"circle.png", "wall.png"}
    report = names["session"].report()
    assert "PromptToPrompt" in report and "PAG" in report and "never acted" not in report
    assert len(names["images"]) == 2 and names["edited"].size == (128, 128)


def test_so_does_that_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert paste(CARD)["result"].images[0].size == (128, 128)
    assert paste(FLOW_CARD)["result"].images[0].size == (128, 128)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_the_error_is_the_one_that_comes(pasted: tuple[dict[str, Any], Path]) -> None:
    names, _ = pasted
    (said,) = blocks(README, "")
    editors = PromptToPrompt(names["prompts"]), MasaCtrl(names["prompts"])
    with pytest.raises(ConflictError) as error:
        hookctl.control(names["pipe"], *editors).__enter__()
    assert f"ConflictError: {error.value}".split() == said.split()


def test_commands_are_known() -> None:
    ours = [words for words in commands() if words[0] == "hookctl"]
    assert len(ours) >= 5
    for words in ours:
        options = parser().parse_args(words[1:])
        if words[1] == "run" and options.stack:
            assert (ROOT / f"demos/presets/{options.stack}.toml").is_file(), words
        for lora in getattr(options, "lora", None) or ():
            assert (ROOT / lora.path).is_file(), words


def test_targets_are_there() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    made = re.findall(r"\bmake (\w+)", README.read_text("utf-8"))
    assert {"demo", "test", "gallery"} <= set(made) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    check_links(page)
