"""Values of a configuration file against the type hints of what they are for.

A hint is read as what can be written in a file: numbers, texts, truth values, lists, tables.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


class Mismatch(Exception):
    """A value that does not fit its hint."""


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What a class is made of, by name: with **options those of its base too."""
    found: dict[str, inspect.Parameter] = {}
    for init in _inits(cls):
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
            if parameter.kind is not parameter.VAR_KEYWORD:
                found.setdefault(name, parameter)
    return found


def hints_of(cls: type) -> dict[str, Any]:
    """The type hints of `parameters`; none where a name is imported for types only."""
    found: dict[str, Any] = {}
    for init in _inits(cls):
        try:
            found = get_type_hints(init) | found
        except NameError:  # nothing is known, nothing refused
            continue
    return found


def _inits(cls: type) -> Iterator[Any]:
    """The `__init__` of a class, and as long as it hands on **options those of its bases."""
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        if init is None or owner is object:
            continue
        yield init
        if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(init).parameters.values()):
            return


def convert(value: Any, hint: Any) -> Any:
    """The value as the hint wants it (an int as float, a list as tuple); raises Mismatch."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first(value, arguments)
    if origin is Literal:
        if value in arguments:
            return value
        raise Mismatch
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise Mismatch from None
    if hint in _WORDS:
        # bool is an int in Python, and is not in a file.
        if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
            return value
        raise Mismatch
    kind = origin or hint
    if not isinstance(kind, type):
        raise Mismatch
    if kind is tuple:
        return _tuple(value, arguments)
    if issubclass(kind, Mapping) and isinstance(value, Mapping):
        of_key, of_value = arguments or (Any, Any)
        return {convert(k, of_key): convert(v, of_value) for k, v in value.items()}
    if _is_list(kind) and isinstance(value, list):
        return [convert(item, arguments[0] if arguments else Any) for item in value]
    raise Mismatch


def _first(value: Any, hints: Sequence[Any]) -> Any:
    """The value by the first hint that takes it: as it stands before any conversion."""
    exact = [hint for hint in hints if isinstance(hint, type) and type(value) is hint]
    for hint in (*exact, *hints):
        try:
            return convert(value, hint)
        except Mismatch:
            continue
    raise Mismatch


def _tuple(value: Any, hints: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise Mismatch
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = [hints[0]] * len(value)
    if hints and len(hints) != len(value):
        raise Mismatch
    return tuple(convert(v, h) for v, h in zip(value, hints or [Any] * len(value), strict=True))


def _is_list(kind: type) -> bool:
    return kind is list or kind in (
        collections.abc.Sequence,
        collections.abc.Iterable,
        collections.abc.Collection,
    )


def describe(hint: Any) -> str:
    """A hint in words, as one would say what to write in a file."""
    return " or ".join(dict.fromkeys(_phrases(hint))) or "nothing that a file can hold"


def _phrases(hint: Any) -> list[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return ["a value"]
    if hint in _WORDS:
        return [_WORDS[hint]]
    if origin in (Union, types.UnionType):
        return [phrase for argument in arguments for phrase in _phrases(argument)]
    if origin is Literal:
        return [repr(argument) for argument in arguments]
    kind = origin or hint
    if not isinstance(kind, type) or hint is type(None):
        return []
    if kind is tuple:
        return [f"[{', '.join(map(describe, arguments))}]"] if arguments else ["a list"]
    if issubclass(kind, Mapping):
        return [f"a table {{word = {describe(arguments[1])}}}"] if arguments else ["a table"]
    if _is_list(kind):
        return [f"a list of ({describe(arguments[0])})"] if arguments else ["a list"]
    return []
