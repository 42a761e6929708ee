"""From a TOML file to a stack, checked against what each recipe takes."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError
from hookctl.preset.check import check_arguments, check_keys, named, shown, typed
from hookctl.preset.installed import class_of
from hookctl.preset.settings import SETTINGS
from hookctl.preset.stack import EditorSpec, HookSpec, ImageSpec, LoraSpec, Preset

if TYPE_CHECKING:
    from hookctl.editor import Editor

_TOP_KEYS = ("model", "lora", "hook", "run", "inversion", "program", "editor")
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
    return preset_of(read_stack(path), recipes, inversions, programs)


def preset_of(
    raw: RawStack,
    recipes: Mapping[str, type[Editor]],
    inversions: Mapping[str, type[Any]] | None = None,
    programs: Mapping[str, type[Any]] | None = None,
) -> Preset:
    """The stack of a file that is read; arguments and errors as those of `load_preset`."""
    data, path = raw.data, raw.path
    with raw.naming():
        inversion = _of_image(data, "inversion", inversions or {}, path)
        program = _of_image(data, "program", programs or {}, path)
        alone = "editor" not in data and (program is not None or bool(raw.hooks))
        specs = () if alone else _editors(data.get("editor"), recipes, path)
    return Preset(
        specs, raw.run, raw.model, raw.loras, raw.hooks, inversion, program, path, raw.sha256
    )


@dataclass(frozen=True)
class RawStack:
    """A file of which everything but its recipes is checked, for which torch is not needed."""

    path: Path
    data: Mapping[str, Any]
    sha256: str
    model: str | None = None
    loras: tuple[LoraSpec, ...] = ()
    hooks: tuple[HookSpec, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Whatever values no reader foresaw, as an InputError that names the file."""
        try:
            yield
        except InputError:
            raise
        except RecursionError:
            raise InputError(
                f"{self.path}: lists or tables are nested too deeply to be read"
            ) from None
        except ValueError as error:  # a number of thousands of digits
            raise InputError(f"{self.path}: can't be read: {error}") from None


def read_stack(path: Path | str) -> RawStack:
    """Read a file as far as that needs no recipe; raises as `load_preset` does."""
    return stack_of(parsed(existing(Path(path))))


def parsed(path: Path, wanted: str = "a stack of editors") -> RawStack:
    """A file with its data as they stand, of which nothing is checked; wanted: what it should be.

    Raises InputError for what is no TOML.
    """
    content = path.read_bytes()
    raw = RawStack(path, {}, hashlib.sha256(content).hexdigest())
    with raw.naming():
        try:
            return replace(raw, data=tomllib.loads(content.decode("utf-8")))
        except UnicodeDecodeError:
            raise InputError(f"{path}: is not text in UTF-8; give {wanted} in TOML") from None
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path}: is not TOML: {error}") from None


def stack_of(raw: RawStack) -> RawStack:
    """The stack in the data of a file, as far as that needs no recipe; raises InputError."""
    path, data = raw.path, raw.data
    with raw.naming():
        check_keys(data, _TOP_KEYS, str(path), "a stack")
        model = data.get("model")
        if model is not None:
            model = typed(model, str, f"{path}: model")
        if "inversion" in data and "program" in data:
            raise InputError(f"{path}: both [inversion] and [program] take the image; give one")
        loras, hooks = _loras(data.get("lora", []), path), _hooks(data.get("hook", []), path)
        run = _run(data.get("run", {}), path)
    return replace(raw, model=model, loras=loras, hooks=hooks, run=run)


def existing(path: Path, wanted: str = "a stack of editors") -> Path:
    """The path, if there is such a file; else FileNotFoundError. wanted: what it should be."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give {wanted} in TOML")
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


def _hooks(tables: Any, path: Path) -> tuple[HookSpec, ...]:
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InputError(
            f'{path}: hook = {shown(tables)}; write a table for each, such as [[hook]] path = "..."'
        )
    found = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[hook]] {number}"
        if "path" not in table:
            raise InputError(f"{where}: needs path (a text)")
        given = dict(table)
        file = typed(given.pop("path"), str, f"{where} path")
        strength = given.pop("strength", None)
        if strength is not None:
            strength = typed(strength, float, f"{where} strength")
        file = _beside(file, path.parent)  # else a file of a repository
        given = {key: _beside(value, path.parent) for key, value in given.items()}
        found.append(HookSpec(file, strength, given, where))
    return tuple(found)


def _beside(value: Any, folder: Path) -> Any:
    """A value, with every text in it that names a file beside the stack as that file's path."""
    if isinstance(value, list):
        return [_beside(one, folder) for one in value]
    if isinstance(value, dict):
        return {key: _beside(one, folder) for key, one in value.items()}
    # Others are words that a file or folder may happen to have for a name.
    if not isinstance(value, str) or not (Path(value).suffix or "/" in value):
        return value
    try:
        return str(folder / value) if (folder / value).exists() else value
    except (OSError, ValueError):  # a text that can be no path
        return value


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
            cls = recipes[named(table, recipes, where)]
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
    name = named(table, classes, where)
    where = f"{where} ({name})"
    return ImageSpec(name, classes[name], check_arguments(table, classes[name], where, key), where)
