"""The pages of the site, from Markdown, docstrings, presets and the gallery.

    python docs/site/build.py --to out/docs

writes `out/docs/pages` and `out/docs/mkdocs.yml`, from which `mkdocs build` makes `out/docs/site`
(`make docs` does both). It needs nothing but Python: no torch, no mkdocs.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import links
import notebooks
import recipe_pages

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Pages that stand elsewhere in the checkout, by the names they have here.
ELSEWHERE = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "demos/gallery.md": "gallery.md",
    "demos/shapes/weights/README.md": "shapes.md",
    "demos/shapes/flow/weights/README.md": "shapes_flow.md",
    "docs/devices/README.md": "devices.md",
}
# Files whose interface has a page of the reference.
DOORS = {
    "hookctl/__init__.py": "api/use.md",
    "hookctl/session.py": "api/use.md",
    "hookctl/maps/editor.py": "api/use.md",
    "hookctl/editor.py": "api/editors.md",
    "hookctl/run_state.py": "api/editors.md",
    "hookctl/address/sites.py": "api/editors.md",
    "hookctl/attention/call.py": "api/editors.md",
    "hookctl/loop/state.py": "api/editors.md",
    "hookctl/loop/trajectory.py": "api/editors.md",
    "hookctl/loop/calls.py": "api/more.md",
    "hookctl/errors.py": "api/errors.md",
    "hookctl/learned/__init__.py": "api/learned.md",
}
PICTURES = ("demos/gallery/*.jpg", "demos/prompt_to_prompt.png", "docs/pictures/*")
NOTEBOOKS = ("first_edit", "own_editor", "real_picture")

Navigation = list[dict[str, object]]


def written(out: Path) -> Path:
    """All pages under `out/pages`, and `out/mkdocs.yml`; the folder of the pages."""
    folder = out / "pages"
    if folder.exists():
        shutil.rmtree(folder)
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    for pattern in PICTURES:
        for source in sorted(ROOT.glob(pattern)):
            to = folder / "pictures" / source.name
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, to)
    shutil.copyfile(DOCS / "site/site.css", folder / "site.css")
    settings = (DOCS / "site/mkdocs.yml").read_text("utf-8")
    settings = settings.replace("ROOT", ROOT.as_posix())
    settings = settings.replace("NAVIGATION", json.dumps(navigation(), ensure_ascii=False))
    (out / "mkdocs.yml").write_text(settings, "utf-8")
    return folder


def pages() -> dict[str, str]:
    """Every page's text by its name."""
    made = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.glob("*.md"))}
    found = {
        name: links.moved(included(path), path.parent, name, moves()) for name, path in made.items()
    }
    for source, name in ELSEWHERE.items():
        path = ROOT / source
        found[name] = links.moved(path.read_text("utf-8"), path.parent, name, moves())
    for recipe in recipe_pages.every():
        found[recipe.page] = recipe.text()
    for name in NOTEBOOKS:
        path = DOCS / f"notebooks/{name}.py"
        text = notebooks.page(path.read_text("utf-8"))
        found[f"notebooks/{name}.md"] = links.moved(
            text, path.parent, f"notebooks/{name}.md", moves()
        )
    return found | dict(reference())


def moves() -> dict[Path, str]:
    """Where what a page can point to is on the site: path in the checkout -> name of the page."""
    found = {path: path.relative_to(DOCS).as_posix() for path in DOCS.glob("*.md")}
    found |= {ROOT / source: name for source, name in ELSEWHERE.items()}
    found |= {ROOT / recipe.source: recipe.page for recipe in recipe_pages.every()}
    found |= {DOCS / f"notebooks/{name}.py": f"notebooks/{name}.md" for name in NOTEBOOKS}
    found |= {ROOT / source: name for source, name in DOORS.items()}
    found[ROOT / "README.md"] = "index.md"
    for pattern in PICTURES:
        found |= {path: f"pictures/{path.name}" for path in ROOT.glob(pattern)}
    return found


def included(path: Path) -> str:
    """A page's text with the sections of others that it asks for in comments."""

    def section(match: re.Match[str]) -> str:
        other = path.parent / match[1]
        text = links.section(other.read_text("utf-8"), match[2])
        # The page's own folder is where the links must be right.
        return links.rebased(text, other.parent, path.parent)

    return re.sub(r"<!-- include (\S+)#([\w-]+) -->", section, path.read_text("utf-8"))


# -- the reference ---------------------------------------------------------------------------------


def reference() -> Iterator[tuple[str, str]]:
    """The pages of the interface, from what the packages export."""
    for page, title, names in groups():
        yield page, _page_of(title, [f"hookctl.{name}" for name in names])
    yield "api/errors.md", _page_of("Errors", [f"hookctl.errors.{n}" for n in _classes("errors")])
    learned = [
        f"{package}.{name}"
        for package in ("hookctl.learned", "hookctl.learned.collaborative")
        for name in _exported(package)
    ]
    yield "api/learned.md", _page_of("Trained modules", learned)
    yield "api/more.md", _page_of("Further doors", MORE)


# Its verbs stand in its bases, beside what the library alone uses.
OPTIONS = {
    "hookctl.AttentionCall": """
    options:
      inherited_members: true
      filters: ["!^_", "!^(fold|show_to|set_context_source|sequence|operations|read_outs)$"]"""
}
BRANCHES = ("COND", "UNCOND")
MORE = (
    "hookctl.loop.calls.predict",
    "hookctl.address.sites.matcher",
    "hookctl.address.families.declare_pipelines",
)


def groups() -> list[tuple[str, str, list[str]]]:
    """(page, title, names) of the interface, as the package's docstring groups it."""
    text = ast.get_docstring(ast.parse((ROOT / "hookctl/__init__.py").read_text("utf-8"))) or ""
    exported = _exported("hookctl")
    use, _, write = text.partition("Write an editor")
    found = []
    for page, title, part in (("use", "Use it", use), ("editors", "Write an editor", write)):
        words = re.findall(r"\w+", "\n".join(re.findall(r"^ {4,8}(\w.*?)(?:   |$)", part, re.M)))
        named = [name for name in dict.fromkeys(words) if name in exported and name != "errors"]
        found.append((f"api/{page}.md", title, named))
    return found


def _exported(package: str) -> list[str]:
    """The `__all__` of a package."""
    path = ROOT / package.replace(".", "/") / "__init__.py"
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise KeyError(package)


def _classes(module: str) -> list[str]:
    tree = ast.parse((ROOT / f"hookctl/{module}.py").read_text("utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def _page_of(title: str, names: Sequence[str]) -> str:
    """A page whose entries mkdocstrings fills in; constants have no docstrings to read."""
    parts = [f"# {title}"]
    constants = [f"`{name}`" for name in names if name.rpartition(".")[2] in BRANCHES]
    if constants:
        parts.append(f"{', '.join(constants)}: the branches that see the prompt, and that do not.")
    for name in names:
        if f"`{name}`" not in constants:
            parts.append(f"::: {name}" + OPTIONS.get(name, ""))
    return "\n\n".join(parts) + "\n"


# -- navigation ------------------------------------------------------------------------------------


def navigation() -> Navigation:
    methods: list[object] = ["recipes.md"]
    for group, members in recipe_pages.grouped().items():
        methods.append({group: [{one.name: one.page} for one in members]})
    return [
        {"Home": "index.md"},
        {
            "Start": [
                "start.md",
                {"Models": "families.md"},
                {"Programs": "programs.md"},
                {"First edit": "notebooks/first_edit.md"},
                {"Real picture": "notebooks/real_picture.md"},
                {"Servers": "servers.md"},
                {"Errors and cures": "errors.md"},
            ]
        },
        {"Recipes": [*methods, {"Gallery": "gallery.md"}]},
        {"Trained modules": "learned.md"},
        {
            "Editors": [
                "editors.md",
                {"Verbs": "verbs.md"},
                {"Hooks": "hooks.md"},
                {"A method in one file": "method.md"},
                {"Debugging": "debugging.md"},
                {"Notebook": "notebooks/own_editor.md"},
            ]
        },
        {
            "Evidence": [
                {"What works where": "what_works.md"},
                {"Measured": "measured.md"},
                {"Recipes by family": "recipe_families.md"},
                {"Conformance": "conformance.md"},
                {"How it compares": "comparison.md"},
                {"By device": "devices.md"},
                {"The embedded model": "shapes.md"},
                {"Its flow-matching sibling": "shapes_flow.md"},
            ]
        },
        {
            "Reference": [
                {"Use it": "api/use.md"},
                {"Write an editor": "api/editors.md"},
                {"Trained modules": "api/learned.md"},
                {"Errors": "api/errors.md"},
                {"Further doors": "api/more.md"},
            ]
        },
        {"Project": [{"Changes": "changes.md"}, {"Contributing": "contributing.md"}]},
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--to", type=Path, default=Path("out/docs"), metavar="DIR")
    options = parser.parse_args(arguments)
    print(f"written: {written(options.to)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
