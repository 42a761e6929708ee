"""The keys and values of a table against those that are wanted, with what would do."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from hookctl.errors import InputError
from hookctl.preset.settings import SETTINGS
from hookctl.preset.signature import Mismatch, convert, describe, hints_of, parameters
from hookctl.preset.stack import FILLED

# How to give what a run fills; of settings, they say it themselves.
_INSTEAD = {
    "prompts": "write prompt = and edit = in [run], or give --prompt and --edit",
    "source_prompt": "write prompt = and edit = in [run], or give --prompt and --edit",
    "image": "give --image",
    "pipe": "write model = at the top, or give --model",
    "size": "write width = and height = in [run], or give --width and --height",
    **{name: setting.instead for name, setting in SETTINGS.items()},
}


def check_arguments(table: Mapping[str, Any], cls: type, where: str, kind: str) -> dict[str, Any]:
    """The arguments in the table of a recipe, with the types that its `__init__` wants.

    kind: of the table, a key of FILLED.
    """
    arguments = {key: value for key, value in table.items() if key != "recipe"}
    taken = parameters(cls)
    allowed = check_names(arguments, list(taken), where, kind)
    check_keys(arguments, allowed, where, cls.__name__)
    variadic = inspect.Parameter.VAR_POSITIONAL
    missing = [
        name
        for name in allowed
        if taken[name].default is inspect.Parameter.empty
        and taken[name].kind is not variadic
        and name not in arguments
    ]
    hints = hints_of(cls)
    if missing:
        wanted = ", ".join(f"{name} ({describe(hints.get(name, Any))})" for name in missing)
        raise InputError(f"{where}: needs {wanted}")
    checked = {}
    for name, value in arguments.items():
        hint = hints.get(name, Any)
        if taken[name].kind is variadic:
            hint = list[hint]  # type: ignore[valid-type]
        checked[name] = typed(value, hint, f"{where} {name}")
    return checked


def check_names(given: Mapping[str, Any], taken: list[str], where: str, kind: str) -> list[str]:
    """Of the arguments that a recipe takes those that a file may give; the others are the run's.

    InputError if it gives one of the others.
    """
    filled = FILLED[kind]
    for name in filled:
        if name in given and name in taken:
            verb = "belong" if name.endswith("s") else "belongs"
            raise InputError(f"{where}: {name} {verb} to the run; {_INSTEAD[name]}")
    return [name for name in taken if name not in filled]


def named(table: Mapping[str, Any], known: Iterable[str], where: str) -> str:
    """The recipe that a table names."""
    name = table.get("recipe")
    if not isinstance(name, str):
        raise InputError(f"{where}: recipe is missing; give one of: {', '.join(known)}")
    if name not in known:
        raise InputError(
            f"{where}: recipe={shown(name)} is not known{near(name, known)}; there are: "
            f"{', '.join(known)}"
        )
    return name


def check_keys(given: Mapping[str, Any], allowed: Iterable[str], where: str, owner: str) -> None:
    """Raise InputError for a key that `owner` does not have."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise InputError(
                f"{where}: {shown(key)} is not a key of {owner}{near(key, allowed)}; there are: "
                f"{', '.join(allowed)}"
            )


def typed(value: Any, hint: Any, where: str) -> Any:
    """The value as the hint wants it; InputError if it can't be."""
    try:
        return convert(value, hint)
    except Mismatch:
        raise InputError(f"{where} = {shown(value)}; give {describe(hint)}") from None


def near(name: str, known: Iterable[str]) -> str:
    """A question whether one of these names was meant, "" if none is like it."""
    lower = {one.lower(): one for one in known}
    found = [lower[m] for m in get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def shown(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4 300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
