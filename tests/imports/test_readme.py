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

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "demos/gallery.md", *(ROOT / "docs").glob("*.md")]
STEPS = 2  # in place of the README's: what is drawn does not matter here


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in a language, "" for none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands() -> list[list[str]]:
    """Every line of the README's shell blocks as words, without its comment."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The names that the README's Python defines, block after block, and what it wrote."""
    folder, names = tmp_path_factory.mktemp("readme"), dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, text in enumerate(blocks("python"), 1):
            text = re.sub(r"\b((?:num_inference_)?steps)=\d+", rf"\1={STEPS}", text)
            exec(compile(text, f"README.md, block {number}", "exec"), names)
    return names, folder


def test_python_runs_as_it_stands(
    pasted: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names, folder = pasted
    assert {path.name for path in folder.iterdir()} == {"circle.png", "wall.png"}
    report = names["session"].report()
    assert "PromptToPrompt" in report and "PAG" in report and "never acted" not in report
    assert len(names["images"]) == 2 and names["edited"].size == (128, 128)


def test_the_error_is_the_one_that_comes(pasted: tuple[dict[str, Any], Path]) -> None:
    names, _ = pasted
    (said,) = blocks("")
    editors = PromptToPrompt(names["prompts"]), MasaCtrl(names["prompts"])
    with pytest.raises(ConflictError) as error:
        hookctl.control(names["pipe"], *editors).__enter__()
    assert f"ConflictError: {error.value}".split() == said.split()


def test_commands_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    ours = [words for words in commands() if words[0] == "hookctl"]
    assert len(ours) >= 5
    for words in ours:
        options = parser().parse_args(words[1:])
        if words[1] == "run" and options.stack:
            assert (ROOT / f"demos/presets/{options.stack}.toml").is_file()
        for _, path in getattr(options, "lora", None) or ():
            assert path
    made = re.findall(r"\bmake (\w+)", README.read_text("utf-8"))
    assert {"demo", "test", "gallery"} <= set(made) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path), link


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}
