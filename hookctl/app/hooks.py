"""Learned weights as cards: what the options of each are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, get_type_hints

from hookctl.cli.stacks import PRESETS
from hookctl.learned.loading import builder_of, open_source, options_of
from hookctl.preset import HookSpec, load_preset

Options = tuple[Mapping[str, inspect.Parameter], Mapping[str, Any], str]
# Options that the run fills, or that a file would be opened for: a page names none.
_NOT_HERE = frozenset(
    "prompts image images weights identity_net analysis image_encoder negative style inpaint maps "
    "mask sketch".split()
)
_SHIPPED = ("grounding", "identity")  # presets of learned weights that come along


def shipped() -> dict[str, HookSpec]:
    """The weights that come along with the embedded model, by the name of their card.

    They are those of presets, without the places that the preset has for them.
    """
    found = {}
    for name in _SHIPPED:
        [hook] = load_preset(PRESETS / f"{name}.toml", {}).hooks
        given = {k: v for k, v in hook.arguments.items() if k not in ("instances", "people")}
        for one in hook.arguments.get("people", ())[:1]:
            given["people"] = [{"embedding": one["embedding"]}]
        found[name.capitalize()] = HookSpec(str(Path(hook.path).resolve()), hook.strength, given)
    return found


def options_by_name(
    pipe: Any, hooks: Sequence[HookSpec], known: Mapping[str, HookSpec] | None = None
) -> tuple[dict[str, HookSpec], dict[str, Options]]:
    """The weights by the name of their card, and the parameters, hints and docstring of each.

    known: some that have a name. InputError for a file that is nothing that could be attached.
    """
    named = dict(known or {})
    for hook in hooks:
        name = PurePath(hook.path).name
        while name in named:
            name = f"{name} (again)"
        named[name] = hook
    options = {}
    for name, hook in named.items():
        title = title_of(PRESETS / f"{name.lower()}.toml") if name in (known or {}) else ""
        options[name] = _options(pipe, hook, title)
    return named, options


def title_of(preset: Path) -> str:
    """What a stack does: its first line."""
    return preset.read_text("utf-8").partition("\n")[0].lstrip("# ").rstrip(".")


def _options(pipe: Any, hook: HookSpec, title: str) -> Options:
    kind = open_source(hook.path, pipe).kind
    builder, hints = builder_of(kind), dict[str, Any]()
    with suppress(NameError):  # types that are imported for checks only
        hints = get_type_hints(builder) | get_type_hints(_editor_of(builder).__init__)
    taken = {key: one for key, one in options_of(kind).items() if key not in _NOT_HERE}
    strength = "scale" if "scale" in taken else "strength"  # IP-Adapters call it so
    given = {**hook.arguments, **({} if hook.strength is None else {strength: hook.strength})}
    for key in taken.keys() & given.keys():
        taken[key] = taken[key].replace(default=given[key])
    more = inspect.getdoc(_editor_of(builder)) or ""
    return taken, hints, f"{title or f'Learned weights of the kind {kind.name}.'}\n\n{more}"


def _editor_of(builder: Any) -> Any:
    """The class that a builder makes, whose docstring tells the options."""
    found: Any = None
    with suppress(NameError):
        found = get_type_hints(builder).get("return")
    return found if isinstance(found, type) else builder
