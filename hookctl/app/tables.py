"""What the widgets of a form hold as a preset's table, and back."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hookctl.app.forms import OWN, Field, Form
from hookctl.app.places import bounds, joined
from hookctl.errors import InputError
from hookctl.preset.check import near
from hookctl.preset.write import text as toml


@dataclass(frozen=True)
class Context:
    """What fields are about: the places that were drawn ("box:0,0,0.5,1"), their texts, and which
    words each prompt has."""

    areas: Sequence[str] = ()
    labels: Sequence[str] = ()
    prompts: Sequence[str] = ()
    has: Callable[[str, str], bool] = lambda prompt, word: word in prompt.split()


def arguments_of(form: Form, values: Mapping[str, Any], context: Context, where: str) -> dict:
    """The table of an editor; what is as by default is left out.

    InputError, led by `where`, for a field whose value can't be read.
    """
    fields = {field.name: field for field in form.fields}
    for name in values:
        if name not in fields:
            raise InputError(f"{where}: has no {name!r}{near(name, fields)}")
    found = {}
    for name, field in fields.items():
        value = argument(field, values.get(name, field.default), context, f"{where} {name}")
        if value is not None:
            found[name] = value
    return found


def argument(field: Field, value: Any, context: Context, where: str) -> Any:
    """What a field's value is in a table; None for what is left to the recipe."""
    if field.kind in ("areas", "labels"):
        return _drawn(field, value, context, where)
    if field.kind == "area":
        return _area(field, value, context, where)
    if field.kind == "words":
        return _words(field, list(value or ()), context)
    if field.kind == "value":
        return None if value == field.default else _read(value, where)
    if field.kind in ("number", "slider") and value is None:
        raise InputError(f"{where}: is empty; give a number, such as {field.default:g}")
    if field.whole and isinstance(value, float) and value.is_integer():
        value = int(value)
    if value == field.default or (field.kind == "choice" and value == OWN):
        return None
    return value


def _drawn(field: Field, value: Any, context: Context, where: str) -> Any:
    """The places or their texts, unless the field says others itself."""
    if field.name == "people":  # whose tables name files: never as they are typed
        return [_person(area, len(context.areas)) for area in context.areas] or None
    if (own := _read(value, where)) is not None:
        return own
    found = context.areas if field.kind == "areas" else context.labels
    if not found:
        if field.needed:
            raise InputError(f"{where}: there is no box yet; draw one on the picture")
        return None
    if field.name == "boxes":  # of learned weights, which take numbers
        return [bounds(area) for area in found]
    named = field.named or field.name == "instances"
    if (field.kind == "labels" or named) and not all(context.labels):
        number = [*map(bool, context.labels)].index(False) + 1
        raise InputError(f"{where}: box {number} has no text; write what belongs there beside it")
    if field.name == "instances":
        return [*map(_instance, context.labels, found)]
    return dict(zip(context.labels, found, strict=True)) if field.named else list(found)


def _area(field: Field, value: Any, context: Context, where: str) -> Any:
    """One area: what is drawn, all of it where one is needed, else the places whose numbers are
    given; or one that the field says itself."""
    text = str(value or "").strip()
    if not text and not field.needed:
        return None
    if text and not re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        return _read(value, where)
    count = len(context.areas)
    if not count:
        raise InputError(f"{where}: there is no box yet; draw one on the picture")
    numbers = [int(one) for one in re.findall(r"\d+", text)] or range(1, count + 1)
    for number in numbers:
        if not 1 <= number <= count:
            raise InputError(f"{where}: there is no place {number}; give numbers from 1 to {count}")
    return joined([context.areas[number - 1] for number in numbers])


def _instance(caption: str, area: str) -> dict[str, Any]:
    """A thing at its place, as InstanceDiffusion's tables have it."""
    boxed = area.startswith("box:")
    return {"caption": caption, **({"box": bounds(area)} if boxed else {"mask": area})}


def _person(area: str, count: int) -> dict[str, Any]:
    """Where somebody is, as InstantID's tables have it: the corners of the place are eyes and
    mouth, its middle the nose (see demos/presets/identity.toml). Of several, each has a region."""
    x0, y0, x1, y1 = bounds(area)
    middle = [(x0 + x1) / 2, (y0 + y1) / 2]
    points = [[x0, y0], [x1, y0], middle, [x0, y1], [x1, y1]]
    return {"keypoints": points, **({"region": area} if count > 1 else {})}


def _words(field: Field, words: list[str], context: Context) -> Any:
    """Words, for a local blend those of each prompt."""
    if not words:
        return None
    if field.name in ("blend", "subtract") and len(context.prompts) > 1:
        return [[w for w in words if context.has(prompt, w)] for prompt in context.prompts]
    return words


def _read(value: Any, where: str) -> Any:
    """A value as TOML writes it; None if there is none."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        found = tomllib.loads(f"value = {value.strip()}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        wanted = 'a number, true, "a text", [a, list] or {a = 1}'
        raise InputError(f"{where}: {value!r} can't be read; write {wanted}") from None
    if any(re.match(r"\s*([^:=]+=)?\s*mask\s*:(?!data:)", text) for text in _texts(found)):
        raise InputError(f"{where}: files are not read for a page; draw a box instead")
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def held(field: Field, value: Any) -> Any:
    """What a field's widget holds for a value of a table: the reverse of `argument`."""
    if field.kind == "words":
        flat: list[str] = []
        for item in [value] if isinstance(value, str) else value:
            flat += [item] if isinstance(item, str) else item or []
        return list(dict.fromkeys(flat))
    if field.kind in ("areas", "area", "labels", "value"):
        return toml(value)
    return value
