"""From a TOML file to a stack, checked against what each recipe takes."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError
from hookctl.preset.check import check_arguments, check_keys, near, shown, typed
from hookctl.preset.installed import class_of
from hookctl.preset.settings import SETTINGS
from hookctl.preset.stack import EditorSpec, ImageSpec, LoraSpec, Preset

if TYPE_CHECKING:
    from hookctl.editor import Editor

_TOP_KEYS = ("model", "lora", "run", "inversion", "program", "editor")
_LORA_KEYS: Mapping[str, Any] = {"path": str, "weight": float}


def load_preset(
    path: Path | str,
    recipes: Mapping[str, type[Editor]],
    inversions: Mapping[str, type[Any]] | None = None,
    programs: Mapping[str, type[Any]] | None = None,
) -> Preset:
    """Read a stack.

    recipes: the editors that it may name, besides classes of installed packages; inversions and
    programs: what it may do with an image.

    Raises FileNotFoundError if there is no such file, and InputError, with the file, the key and
    what would do, for anything in it that is wrong.
    """
    path = existing(Path(path))
    content = path.read_bytes()
    try:
        data = tomllib.loads(content.decode("utf-8"))
        check_keys(data, _TOP_KEYS, str(path), "a stack")
        model = data.get("model")
        if model is not None:
            model = typed(model, str, f"{path}: model")
        loras, run = _loras(data.get("lora", []), path), _run(data.get("run", {}), path)
        inversion = _of_image(data, "inversion", inversions or {}, path)
        program = _of_image(data, "program", programs or {}, path)
        if inversion and program:
            raise InputError(f"{path}: both [inversion] and [program] take the image; give one")
        alone = program is not None and "editor" not in data
        specs = () if alone else _editors(data.get("editor"), recipes, path)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text in UTF-8; give a stack of editors in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: lists or tables are nested too deeply to be read") from None
    except InputError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path}: can't be read: {error}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    return Preset(specs, run, model, loras, inversion, program, path, sha256)


def existing(path: Path) -> Path:
    """The path, if there is such a file; else FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give a stack of editors in TOML")
    return path


def _loras(tables: Any, path: Path) -> tuple[LoraSpec, ...]:
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InputError(
            f'{path}: lora = {shown(tables)}; write a table for each, such as [[lora]] path = "..."'
        )
    found = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[lora]] {number}"
        check_keys(table, _LORA_KEYS, where, "a LoRA")
        if "path" not in table:
            raise InputError(f"{where}: needs path (a text)")
        values = {
            key: typed(value, _LORA_KEYS[key], f"{where} {key}") for key, value in table.items()
        }
        found.append(LoraSpec(path.parent / values["path"], values.get("weight", 1.0)))
    return tuple(found)


def _run(table: Any, path: Path) -> dict[str, Any]:
    where = f"{path}: [run]"
    if not isinstance(table, dict):
        raise InputError(
            f"{where}: {shown(table)} given; a table expected, such as [run] steps = 30"
        )
    check_keys(table, SETTINGS, where, "a run")
    found = {}
    for key, value in table.items():
        found[key] = typed(value, SETTINGS[key].hint, f"{where} {key}")
        if wanted := SETTINGS[key].lacks(found[key]):
            raise InputError(f"{where} {key} = {shown(value)}; give {wanted}")
    return found


def _editors(
    tables: Any, recipes: Mapping[str, type[Editor]], path: Path
) -> tuple[EditorSpec, ...]:
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables) or not tables:
        raise InputError(
            f"{path}: holds no editor; write a table for each, such as "
            f'[[editor]] recipe = "{next(iter(recipes), "...")}"'
        )
    found = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[editor]] {number}"
        name = table.get("recipe")
        if isinstance(name, str) and ":" in name:
            cls = class_of(name, where)
        else:
            cls = recipes[_named(table, recipes, where)]
        where = f"{where} ({name})"
        arguments = check_arguments(table, cls, where, "editor")
        found.append(EditorSpec(str(name), cls, arguments, where))
    return tuple(found)


def _of_image(
    data: Mapping[str, Any], key: str, classes: Mapping[str, type[Any]], path: Path
) -> ImageSpec | None:
    """What a file says under `key` to do with the image."""
    table, where = data.get(key), f"{path}: [{key}]"
    if table is None:
        return None
    if not isinstance(table, dict):
        raise InputError(
            f"{where}: {shown(table)} given; a table expected, such as [{key}] "
            f'recipe = "{next(iter(classes), "...")}"'
        )
    name = _named(table, classes, where)
    where = f"{where} ({name})"
    return ImageSpec(name, classes[name], check_arguments(table, classes[name], where, key), where)


def _named(table: Mapping[str, Any], known: Mapping[str, Any], where: str) -> str:
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
