"""What the documents say can be pasted, what they name is there, and the site fits together."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
from PIL import Image

import hookctl
from hookctl.editor import HOOKS
from tests import zoo
from tests.imports.pages import (
    HUB,
    RAISES,
    ROOT,
    Block,
    anchors,
    blocks_of,
    check_links,
    paste,
    shortened,
)
from tests.zoo.wild import WILD

PAGES = sorted(ROOT.glob("docs/*.md"))
WITH_PYTHON = [
    page
    for page in (*PAGES, ROOT / "CONTRIBUTING.md")
    if any(b.language == "python" and b.title != HUB for b in blocks_of(page))
]
ON_THE_HUB = [(page, block) for page in PAGES for block in blocks_of(page) if block.title == HUB]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.py"))
# The zoo's tiny pipeline in the place of each that is named.
STAND_INS = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
    "WanPipeline": "wan",
    "HunyuanVideoPipeline": "HunyuanVideoPipeline",
}
# What a tiny one is told beside that: its text encoder has fewer layers than those that are read.
# Its tokenizer makes more of a template than is cut off.
FURTHER = {
    "Flux2KleinPipeline": "text_encoder_out_layers=(1, 2, 3), ",
    "HunyuanVideoPipeline": "prompt_template={'template': 'say {}', 'crop_start': 0}, ",
}
TINY = {**WILD, **zoo.PIPELINES}


@pytest.fixture(scope="module")
def shapes() -> Any:
    return hookctl.load_shapes()


@pytest.fixture
def here(shapes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with the embedded pipeline loaded already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hookctl, "load_shapes", lambda **_: shapes)
    return tmp_path


@pytest.mark.slow  # whole pages of examples, two steps each
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda path: path.stem)
def test_python_runs_as_it_stands(page: Path, here: Path) -> None:
    paste(page)


def _name(value: Any) -> str:
    return value.stem if isinstance(value, Path) else f"block {value.number}"


@pytest.mark.parametrize(("page", "block"), ON_THE_HUB, ids=_name)
def test_what_needs_the_hub_names_what_is_there(page: Path, block: Block) -> None:
    tree = ast.parse(block.text)
    names = {"hookctl": hookctl} | dict(_imported(tree))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        made = _resolved(call.func, names)
        if made is not None and inspect.getmodule(made).__name__.startswith("hookctl"):
            arguments = [None] * len(call.args), {k.arg: None for k in call.keywords if k.arg}
            inspect.signature(made).bind(*arguments[0], **arguments[1])


def _imported(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "diffusers":
            for alias in node.names:
                assert alias.name in dir(diffusers), alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.name, getattr(importlib.import_module(str(node.module)), alias.name)


def _resolved(func: ast.expr, names: dict[str, Any]) -> Any:
    """What of hookctl is called, None if it is not its own."""
    if isinstance(func, ast.Name):
        return names.get(func.id)
    if isinstance(func, ast.Attribute) and (owner := _resolved(func.value, names)) is not None:
        return getattr(owner, func.attr)
    return None


@pytest.mark.slow  # a run of each family
@pytest.mark.parametrize(("page", "block"), ON_THE_HUB, ids=_name)
def test_it_runs_with_a_tiny_model_in_its_place(
    page: Path, block: Block, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = [name for name in STAND_INS if f"import {name}\n" in block.text]
    if not hasattr(diffusers, name) or STAND_INS[name] not in TINY:
        pytest.skip(f"this diffusers ({diffusers.__version__}) or transformers lacks {name}")
    Image.new("RGB", (64, 64), "orange").save(here / "cat.png")
    pipe = TINY[STAND_INS[name]].make()
    kind = type(pipe)
    monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(kind, "to", lambda self, *_: self)
    monkeypatch.setattr(kind, "enable_model_cpu_offload", lambda self: None)
    text = re.sub(r"\b(height|width)=\d+", r"\1=64", block.text)
    text = text.replace("height=", FURTHER.get(name, "") + "height=")
    text = re.sub(r"resize\(\(\d+, \d+\)\)", "resize((64, 64))", text)
    text = re.sub(r"\bnum_frames=\d+", "num_frames=5", text)
    text = re.sub(r"\b(num_inference_steps)=\d+", r"\1=4", text)
    exec(compile(text, f"{page.name}, block {block.number}", "exec"), {})


@pytest.mark.parametrize(
    "whole",
    [
        pytest.param(False, marks=pytest.mark.slow),
        pytest.param(True, marks=pytest.mark.long),  # drawn to the end
    ],
    ids=["shortened", "whole"],
)
@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(script: Path, whole: bool, here: Path) -> None:
    text = script.read_text("utf-8")
    code = text if whole else shortened(text, 4)  # so that a window of 0.3 holds a step
    exec(compile(code, script.name, "exec"), {"__name__": "__main__"})
    assert list(here.glob("*.png"))


def test_every_verb_and_hook_has_its_example() -> None:
    own = {name for cls in hookctl.AttentionCall.__mro__ for name in vars(cls)}
    helpers = {"fold", "show_to", "set_context_source", "require_grid"}
    verbs = {
        name
        for name in own - helpers
        if not name.startswith("_") and inspect.isfunction(getattr(hookctl.AttentionCall, name))
    }
    shown = anchors(ROOT / "docs/verbs.md")
    assert verbs <= shown, f"docs/verbs.md lacks {sorted(verbs - shown)}"
    hooks = {*HOOKS, "attach", "claims", "neutral", "linears"}
    shown = anchors(ROOT / "docs/hooks.md")
    assert hooks <= shown, f"docs/hooks.md lacks {sorted(hooks - shown)}"


def test_every_error_has_its_cure() -> None:
    text = (ROOT / "docs/errors.md").read_text("utf-8")
    raised = {
        name
        for name, value in vars(hookctl.errors).items()
        if inspect.isclass(value) and issubclass(value, hookctl.errors.HookctlError)
    }
    assert {name for name in raised if name not in text} <= {"HookctlError"}
    assert sum(block.title == RAISES for block in blocks_of(ROOT / "docs/errors.md")) >= 8


def test_pictures_of_verbs_are_those_of_their_script() -> None:
    code = "import diagrams, json; print(json.dumps(diagrams.every()))"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs/site", capture_output=True, check=True
    )
    import json

    for name, text in json.loads(made.stdout).items():
        assert (ROOT / "docs/pictures" / name).read_text("utf-8") == text, name


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's pages, as they are before mkdocs makes HTML of them."""
    folder = tmp_path_factory.mktemp("site")
    script = ROOT / "docs/site/build.py"
    subprocess.run([sys.executable, str(script), "--to", str(folder)], check=True)
    return folder


def test_pages_of_the_site_link_to_each_other(pages: Path) -> None:
    found = sorted((pages / "pages").rglob("*.md"))
    assert len(found) > 50
    for page in found:
        check_links(page)


def test_every_recipe_has_a_page(pages: Path) -> None:
    from hookctl import recipes

    found = {path.read_text("utf-8").split("\n")[0] for path in pages.glob("pages/recipes/*.md")}
    assert {f"# {name}" for name in recipes.__all__} == found


def test_every_door_is_in_the_reference(pages: Path) -> None:
    text = "".join(path.read_text("utf-8") for path in pages.glob("pages/api/*.md"))
    missing = [name for name in hookctl.__all__ if not re.search(rf"hookctl\.{name}\b", text)]
    assert set(missing) <= {"errors"}, missing


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("mkdocs", "mkdocstrings", "material")),
    reason='the site is built where mkdocs is installed: pip install -e ".[docs]", or make docs',
)
def test_the_site_is_built_and_loads_nothing_from_elsewhere(pages: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q"]
    subprocess.run([*command, "-f", str(pages / "mkdocs.yml")], check=True)
    for page in (pages / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(https?:)?//",
            page.read_text("utf-8"),
        )
        assert not loaded, page.name
