"""A page for each recipe: from its file, its presets, the gallery and what was measured.

What can't be read off those, what to look out for, is in `recipes.toml`.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import links

ROOT = Path(__file__).resolve().parents[2]
# What a caller uses of the bases.
OPTIONS = """
    options:
      inherited_members: [run, generators, edit]"""
NOTES = Path(__file__).with_name("recipes.toml")


@dataclass(frozen=True)
class Recipe:
    """One published method.

    name: of its class; module: its file's name without ending; notes: of `recipes.toml`.
    """

    name: str
    module: str
    notes: dict[str, Any]

    @property
    def page(self) -> str:
        return f"recipes/{self.module}.md"

    @property
    def source(self) -> str:
        return f"recipes/{self.module}.py"

    def text(self) -> str:
        tree = ast.parse((ROOT / self.source).read_text("utf-8"))
        parts = [*_method(self.name, ast.get_docstring(tree) or ""), *self._shown(), *self._use()]
        parts += ["## Parameters", f"::: hookctl.recipes.{self.module}.{self.name}{OPTIONS}"]
        return "\n\n".join([*parts, *self._measured(), *self._limits()]) + "\n"

    def _shown(self) -> Iterator[str]:
        if demo := self.notes.get("demo"):
            for picture in sorted((ROOT / "demos/gallery").glob(f"{demo}*.jpg")):
                yield f"![{self.name} on an embedded pipeline](../pictures/{picture.name})"
            yield (
                f"On the [embedded pipeline](../shapes.md); all figures are in [the "
                f"gallery](../gallery.md#{demo.replace('_', '-')})."
            )

    def _use(self) -> Iterator[str]:
        yield "## Use"
        for preset in presets(self.name):
            first, *rest = preset.read_text("utf-8").strip().splitlines()
            yield first.lstrip("# ")
            image = " --image photo.png" if self.notes.get("image") else ""
            yield f"```bash\nhookctl run {preset.stem}{image}\n```"
            yield "```toml\n" + "\n".join(rest).strip() + "\n```"
            break
        else:
            yield (
                f"```python\nfrom hookctl import control, recipes\n\n"
                f"with control(pipe, recipes.{self.name}()):\n    ...\n```"
            )
        others = [preset.stem for preset in presets(self.name)][1:]
        if others:
            yield f"It is also in the presets {_listed(others)}."

    def _measured(self) -> Iterator[str]:
        yield "## Measured"
        rates = [row for name in self.notes.get("rates", ()) for row in _rates(name)]
        if rates:
            yield "\n".join([*_head_of_rates(), *rates])
            yield (
                "Of the seeds for which the plain model draws the prompt right, how many the "
                "preset does what it is for. [How this is judged](../measured.md#the-presets)."
            )
        if demo := self.notes.get("demo"):
            text = (ROOT / "demos/gallery.md").read_text("utf-8")
            tables = [
                part
                for part in links.section(text, demo.replace("_", "-")).split("\n\n")
                if part.startswith("|") or part.startswith("seed ")
            ]
            yield "\n\n".join(tables)
        elif not rates:
            yield "By no demo of its own. [What was measured](../measured.md#the-other-methods)."

    def _limits(self) -> Iterator[str]:
        yield "## Limits"
        yield self.notes["limits"].strip()
        if column := self.notes.get("column"):
            yield "\n".join(_where_it_works(column))
            yield "Tried on tiny models; [what the signs mean](../what_works.md)."


def _method(name: str, text: str) -> Iterator[str]:
    """Title and text of a recipe's file, with its formulas as blocks."""
    first, _, rest = text.partition("\n")
    said = first.partition(": ")[2]
    yield f"# {name}"
    yield f"**{said[:1].upper()}{said[1:]}**"
    rest = re.sub(r"arXiv\n?\s*(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", rest)
    yield re.sub(
        r"((?:^(?: {4}.*)\n?|^\n(?= {4}))+)", _as_block, rest.strip() + "\n", flags=re.MULTILINE
    ).strip()


def _as_block(match: re.Match[str]) -> str:
    lines = [line[4:] for line in match[1].strip("\n").splitlines()]
    return "\n```text\n" + "\n".join(lines) + "\n```\n"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@cache
def every() -> tuple[Recipe, ...]:
    """All recipes, in the order of their groups."""
    return tuple(recipe for members in grouped().values() for recipe in members)


@cache
def grouped() -> dict[str, list[Recipe]]:
    """The recipes by group, as the docstring of `hookctl.recipes` has them.

    Raises KeyError for one without notes.
    """
    text = (ROOT / "recipes/__init__.py").read_text("utf-8")
    modules = dict(
        (name, module)
        for module, name in re.findall(r"^from hookctl\.recipes\.(\w+) import (\w+)", text, re.M)
    )
    notes = tomllib.loads(NOTES.read_text("utf-8"))
    found: dict[str, list[Recipe]] = {}
    group = ""
    for line in (ast.get_docstring(ast.parse(text)) or "").splitlines()[1:]:
        if line.startswith("    ") and (name := line.split()[0]) in modules:
            found[group].append(Recipe(name, modules[name], notes[name]))
        elif line.strip():
            group = line.partition(":")[0]
            found[group] = []
    return found


@cache
def presets(name: str) -> tuple[Path, ...]:
    """The presets that use a recipe, those of few editors first."""
    found = []
    for path in sorted((ROOT / "demos/presets").glob("*.toml")):
        stack = tomllib.loads(path.read_text("utf-8"))
        tables = [*stack.get("editor", ()), stack.get("program", {}), stack.get("inversion", {})]
        used = [table.get("recipe") for table in tables if table.get("recipe")]
        if name in used:
            found.append((len(used), path.stem != _snake(name), path))
    return tuple(path for *_, path in sorted(found))


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _rates(name: str) -> list[str]:
    """The rows of a name in the table of presets.

    Raises KeyError if there is none, so that a row that was renamed is found.
    """
    text = links.section((ROOT / "docs/measured.md").read_text("utf-8"), "the-presets")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    found = [row for row in rows if name in row.split("|")[1]]
    if not found:
        raise KeyError(name)
    return found


def _head_of_rates() -> list[str]:
    text = links.section((ROOT / "docs/measured.md").read_text("utf-8"), "the-presets")
    return [line for line in text.splitlines() if line.startswith("|")][:2]


def _where_it_works(column: str) -> list[str]:
    """A column of the README's table of families."""
    text = links.section((ROOT / "README.md").read_text("utf-8"), "what-works-where")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    (index,) = [i for i, head in enumerate(rows[0]) if head.startswith(column)]
    kept = [row[0] for row in rows[2:]], [row[index] or " " for row in rows[2:]]
    return [
        "| " + " | ".join(kept[0]) + " |",
        "|" + "---|" * len(kept[0]),
        "| " + " | ".join(kept[1]) + " |",
    ]
