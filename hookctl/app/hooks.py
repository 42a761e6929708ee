"""Learned weights as cards: what the options of each are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Any, get_type_hints

from hookctl.learned.loading import builder_of, open_source, options_of
from hookctl.preset import HookSpec

Options = tuple[Mapping[str, inspect.Parameter], Mapping[str, Any], str]
_OF_RUN = ("prompts", "image", "weights")  # options that the run fills, or that no form needs


def options_by_name(
    pipe: Any, hooks: Sequence[HookSpec]
) -> tuple[dict[str, HookSpec], dict[str, Options]]:
    """The weights by the name of their card, and the parameters, hints and docstring of each.

    InputError for a file that is known as nothing that could be attached.
    """
    named: dict[str, HookSpec] = {}
    options: dict[str, Options] = {}
    for hook in hooks:
        kind = open_source(hook.path, pipe).kind
        builder, hints = builder_of(kind), dict[str, Any]()
        with suppress(NameError):  # types that are imported for checks only
            hints = get_type_hints(builder)
        name = PurePath(hook.path).name
        while name in named:
            name = f"{name} (again)"
        taken = {key: one for key, one in options_of(kind).items() if key not in _OF_RUN}
        strength = "scale" if "scale" in taken else "strength"  # IP-Adapters call it so
        if hook.strength is not None and strength in taken:
            taken[strength] = taken[strength].replace(default=hook.strength)
        more = inspect.getdoc(_editor_of(builder)) or ""
        doc = f"Learned weights of the kind {kind.name}.\n\n{more}"
        named[name], options[name] = hook, (taken, hints, doc)
    return named, options


def _editor_of(builder: Any) -> Any:
    """The class that a builder makes, whose docstring tells the options."""
    found: Any = None
    with suppress(NameError):
        found = get_type_hints(builder).get("return")
    return found if isinstance(found, type) else builder
