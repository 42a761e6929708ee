"""Imports run one way, as the data does, stage by stage.

Import statements are parsed, not run. An import for types only counts for the direction (it is a
dependency of ideas) and for circles, not for diffusers (it costs nothing when the code runs).
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "hookctl": "hookctl",
    "hookctl.kernels": "triton_kernels",
    "hookctl.recipes": "recipes",
    "hookctl.demos": "demos",
}
# A stage knows those before it, and nothing of those that build on it. An editor's types are those
# of the loop, which calls it: they are one stage.
STAGES = (
    ("hookctl.kernels", "hookctl.errors", "hookctl.bounds"),
    ("hookctl.address", "hookctl.arguments"),
    ("hookctl.attention",),
    ("hookctl.hooks", "hookctl.evaluate"),
    ("hookctl.editor", "hookctl.loop"),
    ("hookctl.engine",),
    (
        "hookctl.session",
        "hookctl.maps",
        "hookctl.references",
        "hookctl.report",
        "hookctl.companions",
    ),
    ("hookctl.recipes", "hookctl.learned", "hookctl.batch"),
    ("hookctl.demos",),
    ("hookctl.cli", "hookctl.app"),
)
# The command, and the page that it serves: they know all others, and nobody knows them.
OUTERMOST = ("hookctl.cli", "hookctl.app", "hookctl.__main__")
KNOW_DIFFUSERS = (
    "hookctl.address.families",
    "hookctl.session",
    "hookctl.learned",
    "hookctl.demos",
    "hookctl.cli",
)


class Import(NamedTuple):
    source: str  # the importing module
    target: str  # the imported module, or module.attribute
    line: int
    when: str  # "load", "call" (inside a function) or "types" (under TYPE_CHECKING)


def inside(module: str, packages: Iterable[str]) -> bool:
    """Whether a module is one of the packages or lies within one of them."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def modules() -> dict[str, Path]:
    """Every module of the package by its importable name; the links are not followed."""
    found = {}
    for package, folder in FOLDERS.items():
        for where, _, files in os.walk(ROOT / folder, followlinks=False):
            for file in files:
                if file.endswith(".py"):
                    path = Path(where, file)
                    parts = path.relative_to(ROOT / folder).with_suffix("").parts
                    found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


def imports(module: str, code: str, is_package: bool = False) -> list[Import]:
    """The import statements of a module, relative ones resolved."""

    def statements(node: ast.AST, when: str) -> Iterator[tuple[ast.stmt, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, when
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from statements(child, "types")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from statements(child, "call")
            else:
                yield from statements(child, when)

    parts = module.split(".")
    result = []
    for node, when in statements(ast.parse(code), "load"):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            base = node.module or ""
            if node.level:
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join([*up, *([base] if base else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        result += [Import(module, target, node.lineno, when) for target in targets]
    return result


def stage_of(module: str) -> int | None:
    """The place of a module's stage in the way of the data; None where it is in no stage."""
    return next((n for n, packages in enumerate(STAGES) if inside(module, packages)), None)


def complaint(i: Import) -> str | None:
    """Why an import is not allowed, or None."""
    if inside(i.target, ["diffusers"]):
        if i.when != "types" and not inside(i.source, KNOW_DIFFUSERS):
            return "only families, session, learned, demos and cli import diffusers"
        return None
    if not inside(i.target, ["hookctl", *FOLDERS.values()]):
        return None
    if not inside(i.target, ["hookctl"]):
        return f"is imported as part of hookctl, not by its folder's name: {i.target}"
    if inside(i.target, ["hookctl.cli", "hookctl.app"]):
        return None if inside(i.source, OUTERMOST) else "nothing imports cli"
    if inside(i.source, ["hookctl.kernels"]) and not inside(i.target, ["hookctl.kernels"]):
        return "kernels know tensors only"
    source, target = stage_of(i.source), stage_of(i.target)
    if source is not None and target is not None and source < target:
        return f"a stage knows nothing of those after it: {', '.join(STAGES[target])}"
    if inside(i.source, ["hookctl.recipes"]) and inside(i.target, ["hookctl.demos"]):
        return "recipes know nothing of demos"
    upper = ["hookctl.recipes", "hookctl.demos"]
    if inside(i.target, upper) and not inside(i.source, [*upper, *OUTERMOST]):
        # hookctl.load_shapes() fetches the embedded pipeline when it is called.
        if not (i.source == "hookctl" and i.when == "call"):
            return "of hookctl/ only cli looks up to recipes and demos"
    return None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The import circles: the strongly connected parts of more than one module."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        queue = list(graph[start])
        while queue:
            module = queue.pop()
            if module not in seen:
                seen.add(module)
                queue += graph[module]
        return seen

    reached = {module: reach(module) for module in graph}
    found = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return [list(circle) for circle in sorted(found)]


@pytest.fixture(scope="module")
def all_imports() -> list[Import]:
    return [
        i
        for module, path in modules().items()
        for i in imports(module, path.read_text(), path.name == "__init__.py")
    ]


def test_imports_run_one_way(all_imports: list[Import]) -> None:
    wrong = [
        f"{i.source}:{i.line} imports {i.target}: {why}"
        for i in all_imports
        if (why := complaint(i))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles(all_imports: list[Import]) -> None:
    names = modules()
    graph: dict[str, set[str]] = {name: set() for name in names}
    for i in all_imports:
        if i.when != "call":
            target = i.target if i.target in names else i.target.rpartition(".")[0]
            if target in names:
                graph[i.source].add(target)
    assert not circles(graph)


@pytest.mark.parametrize(
    ("module", "code", "right"),
    [
        ("hookctl.kernels.a", "import torch, triton\nfrom .b import f", True),
        ("hookctl.kernels.a", "from hookctl.attention import call", False),
        ("hookctl.address.rows", "from ..errors import HookctlError", True),
        ("hookctl.address.rows", "from ..attention.call import Term", False),
        ("hookctl.address.families", "import diffusers", True),
        ("hookctl.address.rows", "def f():\n    import diffusers.models", False),
        ("hookctl.evaluate.plan", "from hookctl.kernels import folded", True),
        ("hookctl.hooks.pipeline", "from hookctl.session import control", False),
        ("hookctl.recipes.masactrl", "import hookctl\nfrom hookctl.editor import Editor", True),
        ("hookctl.recipes.masactrl", "from hookctl.demos.shapes import load", False),
        ("hookctl.demos.gallery", "from hookctl import cli", False),
        ("hookctl.cli.run", "from hookctl.cli import common", True),
        ("hookctl.app.drawing", "from hookctl.cli.draw import Drawing", True),
        ("hookctl.recipes.masactrl", "def f():\n    from hookctl.app import forms", False),
        ("hookctl.__main__", "from hookctl.cli import main", True),
        ("hookctl.demos.gallery", "from recipes import MasaCtrl", False),
        ("hookctl", "def load_shapes():\n    from hookctl.demos import shapes", True),
        ("hookctl", "from hookctl.demos import shapes", False),
        ("hookctl.preset.stack", "from hookctl.recipes import MasaCtrl", False),
        ("hookctl.preset.stack", "from hookctl.editor import Editor", True),
    ],
)
def test_the_rule_itself(module: str, code: str, right: bool) -> None:
    assert right == (not [i for i in imports(module, code) if complaint(i)])


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
