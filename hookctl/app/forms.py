"""Forms of editors, made from their signatures, type hints and docstrings.

A form holds a `Field` for each argument that a file may give (`FILLED` are the run's). A field
holds what its widget does: a number, a truth value, words or a text; `tables` makes of it what a
preset's table holds.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

from hookctl.address.regions import Region
from hookctl.preset import FILLED, parameters
from hookctl.preset.signature import hints_of
from hookctl.preset.write import text as toml

Kind = Literal[
    "switch", "slider", "number", "choice", "words", "areas", "area", "labels", "text", "value"
]

# No form can hold these: tensors, generators, models and the paths of files.
_NOT_HERE = ("path", "generator", "layout", "layout_arguments", "clip", "maps")
# Of programs neither what becomes the pipeline's, nor where the server keeps what it computes.
_NOT_OF_PROGRAMS = ("embeddings", "arguments", "checkpoint", "save_every", "on_cpu", "memory")
# Fractions, whatever recipe they are of.
_FRACTIONS = frozenset(
    "start stop base edge share fidelity threshold decay alone rate quantile top cross_replace "
    "self_replace self_resolution blend_start blend_threshold path_start path_stop bootstrap "
    "back".split()
)
_GAINS = ("scale", "strength", "rho", "sigma")
# What places on the picture become: areas, or tables of learned weights, one for each.
_AREAS = ("regions", "boxes", "instances", "people")
_FIRST = ("strength", "scale", "start", "stop")  # what is seen before "More" is opened
_WHERE = ("blend", "region", "words")  # and, behind these, of what it is
OWN = "the method's own"


@dataclass(frozen=True)
class Field:
    """One argument as a widget.

    default: what the widget holds at first; help: of the docstring; low, high: of a slider;
    choices: of a choice; needed: the argument has no default; whole: a number without fractions;
    named: places under their texts; early: it is shown before "More" is opened.
    """

    name: str
    kind: Kind
    default: Any
    help: str = ""
    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()
    needed: bool = False
    whole: bool = False
    named: bool = False
    early: bool = False

    @property
    def title(self) -> str:
        return {"start": "from", "stop": "until"}.get(self.name, self.name.replace("_", " "))


@dataclass(frozen=True)
class Form:
    """Of one editor. summary: the first sentence of its docstring; use: what it is besides, of
    the keys of `FILLED`."""

    name: str
    summary: str
    fields: tuple[Field, ...]
    use: str = "editor"

    @property
    def has_areas(self) -> bool:
        """Whether what is drawn is used, all of it."""
        return any(f.kind == "areas" or (f.kind == "area" and f.needed) for f in self.fields)


def form_of(cls: type, doc: str | None = None, use: str = "editor") -> Form:
    """The form of a recipe; use: a key of `FILLED`."""
    doc = _docs(cls) if doc is None else doc
    return form(cls.__name__, parameters(cls), hints_of(cls), doc, use)


def form(
    name: str,
    taken: Mapping[str, inspect.Parameter],
    hints: Mapping[str, Any],
    doc: str,
    use: str = "editor",
) -> Form:
    """A form of parameters, their hints and what a docstring says of them."""
    skipped = (*FILLED[use], *_NOT_HERE, *(_NOT_OF_PROGRAMS if use == "program" else ()))
    helps = helps_of(doc, list(taken))
    areas = any(part in taken for part in ("regions", "boxes"))
    fields = [
        _field(parameter, hints.get(key, Any), helps.get(key, ""), areas)
        for key, parameter in taken.items()
        if key not in skipped
    ]
    early = [field for field in fields if field.needed or field.name in _FIRST]
    if not any(field.name in _GAINS[:2] for field in early):  # what else says how strong it is
        early += [f for f in fields if f.kind in ("slider", "number") and f not in early][:1]
    early += [field for field in fields if field.name in _WHERE]
    return Form(name, summary(doc), tuple(replace(f, early=f in early) for f in fields), use)


def _field(parameter: inspect.Parameter, hint: Any, help: str, areas: bool) -> Field:
    name, default = parameter.name, parameter.default
    needed = default is inspect.Parameter.empty
    several = parameter.kind is parameter.VAR_POSITIONAL
    given = None if needed else default
    hints = get_args(hint) or (hint,)
    if name in _AREAS:
        named = isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping)
        return Field(name, "areas", "", help, needed=needed, named=named)
    if Region in hints:
        return Field(name, "area", "", help, needed=needed)
    if areas and name in ("texts", "words", "phrases"):
        return Field(name, "labels", "", help, needed=needed)
    if name in ("words", "blend", "subtract"):
        return Field(name, "words", [], help, needed=needed and not several)
    if isinstance(given, bool):
        return Field(name, "switch", given, help)
    if choices := _choices(hint, given, help):
        return Field(name, "choice", OWN if given is None else given, help, choices=choices)
    if float in hints or int in hints or isinstance(given, int | float):
        whole = float not in hints and not isinstance(given, float)
        return _number(name, given, help, whole)
    if isinstance(given, str):
        return Field(name, "text", given, help)
    if name == "sites":
        return Field(name, "text", "", help)
    return Field(name, "value", "" if given in (None, ()) else toml(given), help, needed=needed)


def _number(name: str, given: Any, help: str, whole: bool) -> Field:
    if given is None or isinstance(given, list | tuple) or given in (float("inf"),):
        return Field(name, "value", "" if given is None else toml(given), help)
    if name in _FRACTIONS:
        return Field(name, "slider", float(given), help)
    if name in _GAINS and not whole:
        return Field(name, "slider", float(given), help, high=10.0 if given <= 5 else 5.0 * given)
    return Field(name, "number", given, help, whole=whole)


def _choices(hint: Any, given: Any, help: str) -> tuple[str, ...]:
    """The texts that will do: of the hint, else those in quotes in the docstring."""
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            own = (OWN,) if given is None else ()
            return (*own, *map(str, get_args(part)))
    if isinstance(given, str) and str in (hint, *get_args(hint)):
        quoted = dict.fromkeys(re.findall(r'"([\w-]+)"', help))
        if given in quoted and len(quoted) > 1:
            return tuple(quoted)
    return ()


# -- what docstrings say ---------------------------------------------------------------------------


def _docs(cls: type) -> str:
    """Of a class and of those that it hands its **options to."""
    return "\n\n".join(
        inspect.cleandoc(one.__doc__) for one in cls.__mro__ if one.__doc__ and one is not object
    )


def summary(doc: str) -> str:
    """The first sentence."""
    first = " ".join(doc.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s", first)[0].rstrip(":")


def helps_of(doc: str, names: Sequence[str]) -> dict[str, str]:
    """name -> what a docstring says of it, in lines such as "scale, shift: of the mask"."""
    if not names:
        return {}
    any_name = "|".join(map(re.escape, names))
    several = rf"((?:{any_name})(?:,\s(?:{any_name}))*):\s"
    listed = re.compile(rf"(?:(?<=^)|(?<=[.;\n] )|(?<=\n)){several}")
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", doc):
        text = "\n".join(line.strip() for line in paragraph.splitlines())
        marks = list(listed.finditer(text))
        for mark, after in zip(marks, [*marks[1:], None], strict=False):
            said = " ".join(text[mark.end() : after.start() if after else None].split())
            for name in re.split(r",\s", mark[1]):
                found.setdefault(name, said.rstrip(";"))
    return found
