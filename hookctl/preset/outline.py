"""The recipes as their sources tell them: names and arguments, without importing any.

Importing recipes brings torch and diffusers, which takes seconds. What is misspelt in a file is
told before: only names are read here, and what can't be read so is left to the recipe itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hookctl.errors import InputError
from hookctl.preset.check import check_keys, check_names, named

_KINDS = {
    "editor": {"Editor"},
    "inversion": {"Inversion"},
    "program": {"CyclicOneWay", "FlowProgram", "Imagic"},
}


@dataclass
class _Class:
    """A class in a source; arguments: of its `__init__`, None if it has none of its own."""

    bases: list[str]
    arguments: list[str] | None = None
    hands_on: bool = False  # **options, those of its bases


@dataclass(frozen=True)
class Outline:
    """arguments: by the name of a recipe; kinds: editor, inversion and program, and their names."""

    arguments: Mapping[str, list[str]] = field(default_factory=dict)
    kinds: Mapping[str, list[str]] = field(default_factory=dict)

    def check(self, data: Mapping[str, Any], path: Path) -> None:
        """InputError for a recipe or an argument in a file that is not known.

        What has another form than a table is left to what reads it.
        """
        editors = data.get("editor")
        tables = [
            ("editor", f"[[editor]] {number}", table)
            for number, table in enumerate(editors if isinstance(editors, list) else (), 1)
        ]
        tables += [(key, f"[{key}]", data.get(key)) for key in ("inversion", "program")]
        for kind, place, table in tables:
            if not isinstance(table, dict):
                continue
            where, name = f"{path}: {place}", table.get("recipe")
            if isinstance(name, str) and ":" in name:
                continue  # of an installed package
            name = named(table, self.kinds[kind], where)
            where = f"{where} ({name})"
            given = {key: value for key, value in table.items() if key != "recipe"}
            check_keys(given, check_names(given, self.arguments[name], where, kind), where, name)

    def takes(self, data: Mapping[str, Any], argument: str) -> bool:
        """Whether an editor of a file, or its program, takes an argument, which its run fills."""
        program = data.get("program")
        names = [*_names(data), *([program.get("recipe")] if isinstance(program, dict) else [])]
        return any(argument in self.arguments.get(str(name), ()) for name in names)

    def takes_image(self, data: Mapping[str, Any]) -> bool:
        return "inversion" in data or "program" in data or self.takes(data, "image")

    def knows_all(self, data: Mapping[str, Any]) -> bool:
        """Whether every editor of a file is known here: none is of another package."""
        return all(name in self.arguments for name in _names(data))


def _names(data: Mapping[str, Any]) -> list[str]:
    """The recipes that a file's editors name."""
    tables = data.get("editor")
    if not isinstance(tables, list):
        return []
    return [str(table.get("recipe")) for table in tables if isinstance(table, dict)]


def outline() -> Outline:
    """Of everything that `hookctl.recipes` names, Maps and References."""
    package = Path(__file__).resolve().parents[1]
    spec = find_spec("hookctl.recipes")
    assert spec is not None and spec.origin is not None  # a package of ours
    recipes = Path(spec.origin).parent
    files = [
        *package.glob("*.py"),
        *package.glob("maps/*.py"),
        *package.glob("loop/*.py"),
        *sorted(recipes.rglob("*.py")),
    ]
    classes = {name: found for path in files for name, found in _classes(path)}
    names = ["Maps", "References", *_all(recipes / "__init__.py")]
    kinds = {
        kind: [name for name in names if bases & {*_line(name, classes)}]
        for kind, bases in _KINDS.items()
    }
    arguments = {name: _arguments(name, classes) for name in names}
    return Outline(arguments, kinds)


def check_early(data: Mapping[str, Any], path: Path) -> Outline:
    """The outline, after a check of a file's names by it."""
    found = outline()
    try:
        found.check(data, path)
    except RecursionError:
        raise InputError(f"{path}: lists or tables are nested too deeply to be read") from None
    return found


def _classes(path: Path) -> Iterator[tuple[str, _Class]]:
    for node in ast.parse(path.read_text("utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found = _Class(
            [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
        )
        if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            fields = [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
            found.arguments = [one.id for one in fields if isinstance(one, ast.Name)]
        for one in node.body:
            if isinstance(one, ast.FunctionDef) and one.name == "__init__":
                given = one.args
                every = [*given.posonlyargs, *given.args][1:]
                every += [given.vararg] if given.vararg else []
                found.arguments = [a.arg for a in (*every, *given.kwonlyargs)]
                found.hands_on = given.kwarg is not None
        yield node.name, found


def _all(path: Path) -> list[str]:
    """The names in `__all__`."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _line(name: str, classes: Mapping[str, _Class]) -> Iterator[str]:
    """A class and those that it stems from, itself first."""
    yield name
    for base in classes[name].bases if name in classes else ():
        yield from _line(base, classes)


def _arguments(name: str, classes: Mapping[str, _Class]) -> list[str]:
    found: dict[str, None] = {}
    for one in _line(name, classes):
        own = classes.get(one)
        if own is None or own.arguments is None:
            continue
        found |= dict.fromkeys(own.arguments)
        if not own.hands_on:
            break
    return list(found)
