"""A stack as a TOML text, which the standard library reads but does not write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hookctl.errors import InputError
from hookctl.preset.stack import EditorSpec, ImageSpec, Preset


def dump_preset(preset: Preset) -> str:
    """The TOML text that `load_preset` reads back as the same stack."""
    lines = [] if preset.model is None else [*pairs({"model": preset.model}), ""]
    for lora in preset.loras:
        lines += ["[[lora]]", *pairs({"path": str(lora.path), "weight": lora.weight}), ""]
    for hook in preset.hooks:
        said = {"path": hook.path, "strength": hook.strength, **hook.arguments}
        lines += ["[[hook]]", *pairs(said), ""]
    if preset.run:
        lines += ["[run]", *pairs(preset.run), ""]
    for key, of_image in (("inversion", preset.inversion), ("program", preset.program)):
        if of_image is not None:
            lines += [f"[{key}]", *_recipe(of_image)]
    for spec in preset.specs:
        lines += ["[[editor]]", *_recipe(spec)]
    return "\n".join(lines)


def _recipe(spec: EditorSpec | ImageSpec) -> list[str]:
    return [*pairs({"recipe": spec.recipe, **spec.arguments}), ""]


def pairs(values: Mapping[str, Any]) -> list[str]:
    """The lines of a table; what is None is left out."""
    return [f"{_key(name)} = {text(value)}" for name, value in values.items() if value is not None]


def text(value: Any) -> str:
    """A number, text, list or table; InputError for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # inf and nan are written so in TOML too
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(text, value)) + "]"
    raise InputError(f"{value!r} has no form in TOML; give numbers, texts, lists or tables")


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else text(name)
