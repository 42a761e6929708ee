"""What a folder of a model, or a file of weights, says is to be loaded: checked before it is.

diffusers and transformers import what a model's files name. Which of it they refuse differs from
version to version: up to 0.36 diffusers runs a Python file that lies beside a component, in every
version it imports any installed module that `model_index.json` calls a library. Here nothing of
a folder is ever run: it may name the classes of diffusers and transformers, and no code of its own.

Only looks at files: needs neither torch nor diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hookctl.errors import InputError

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
LARGEST = 16 * 2**20  # bytes of a configuration; those of tokenizers with many words have about 1
_HEADER = 100 * 2**20  # bytes of the header of a safetensors file, at most
_CODE = (".py", ".pyc", ".so", ".pyd")
_NEVER = "hookctl runs no code that comes with a model"

# What a configuration may say to have code loaded, and the values that name none.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "_module": (),
    "custom_pipeline": (),
    "trust_remote_code": (False,),
    "megatron_core": ("megatron.core",),  # what every LoRA of peft says, and none uses
}
_OF_LIBRARIES = ("parent_library",)  # modules, which must be those of LIBRARIES
_OF_FILES = ("auto_map", "custom_pipelines")  # classes in files beside the configuration
_OF_KERNELS = ("attn_implementation", "_attn_implementation")  # a repository is code


def check_folder(folder: Path) -> None:
    """InputError if a folder, of a pipeline or of one model, names or holds code of its own."""
    index = folder / INDEX
    if not index.is_file():
        return _check_part(folder)
    said = read_json(index)
    _check_values(said, index)
    pipeline = said.get("_class_name")
    if not isinstance(pipeline, str) or not pipeline.isidentifier():
        raise InputError(
            f"{index}: _class_name is {_shown(pipeline)}, and a pipeline class of diffusers is "
            f"needed; {_NEVER}"
        )
    # Names that versions of diffusers look for beside the index.
    for name in ("None", "pipeline", pipeline):
        if (folder / f"{name}.py").exists():
            raise InputError(f"{folder / name}.py: is code; {_NEVER}, so take it out of the folder")
    for name, library, _ in components(said, index):
        _check_library(library, name, index)
        _check_part(folder / name)


def components(said: Mapping[str, Any], index: Path) -> Iterator[tuple[str, str, str]]:
    """(name, library, class) of each part that an index names; InputError for another form."""
    for name, value in said.items():
        if not isinstance(value, list) or name.startswith("_"):
            continue  # a value of the pipeline's own, such as requires_safety_checker
        if value in ([None, None], []) or not any(isinstance(v, str) for v in value):
            continue  # a part that is left out; a list of numbers
        if not name.isidentifier():
            raise InputError(f"{index}: {_shown(name)} is no name of a part, such as unet")
        if len(value) != 2 or not all(isinstance(v, str) and v for v in value):
            raise InputError(f"{index}: {name!r} is {_shown(value)}; give [library, class]")
        if not value[1].isidentifier():
            raise InputError(f"{index}: {name!r} names {_shown(value[1])}, which is no class")
        yield name, value[0], value[1]


def check_weights(path: Path) -> None:
    """InputError if a file is no safetensors file, or its notes name code to be loaded."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_HEADER, path.stat().st_size - 8):
                raise ValueError("its header has no sensible length")
            header = json.loads(file.read(length))
        notes = header.get("__metadata__") or {}
        for key, text in notes.items():
            _check_values({key: _parsed(text)}, path)
    except InputError:
        raise
    except (ValueError, RecursionError, AttributeError) as error:
        reason = _shown(str(error), 80)
        raise InputError(f"{path}: can't be read as safetensors ({reason})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError says what is wrong with it."""
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: has {path.stat().st_size >> 20} MiB; that is no description")
        found = json.loads(path.read_text("utf-8"))
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply to be read") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text in UTF-8; JSON is needed") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise InputError(f"{path}: can't be read as JSON ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {_shown(found)}; a JSON object is needed")
    return found


def _check_part(folder: Path) -> None:
    """Of one component: no code in its folder, and none that its configurations name."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in _CODE:
            raise InputError(f"{path}: is code; {_NEVER}, so take it out of the folder")
        if path.suffix == ".json" and "config" in path.name:
            said = read_json(path)
            name = said.get("_class_name")
            if name is not None and not (isinstance(name, str) and name.isidentifier()):
                raise InputError(f"{path}: _class_name is {_shown(name)}, which is no class")
            _check_values(said, path)


def _check_library(library: str, name: str, index: Path) -> None:
    if library in LIBRARIES or library in _pipelines():
        return
    raise InputError(
        f"{index}: {name!r} comes from {_shown(library)}; only classes of "
        f"{' and '.join(LIBRARIES)} are loaded, and {_NEVER}"
    )


def _pipelines() -> frozenset[str]:
    """The packages of diffusers that hold the classes of some pipelines, such as a safety checker.

    Found as folders, so that diffusers need not be imported.
    """
    spec = find_spec("diffusers")
    if spec is None or spec.origin is None:
        return frozenset()
    inits = (Path(spec.origin).parent / "pipelines").glob("*/__init__.py")
    return frozenset(path.parent.name for path in inits)


def _check_values(said: Any, path: Path) -> None:
    """InputError if anything in a configuration would have code loaded."""
    try:
        found = next(_loading(said, path.parent), None)
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply to be read") from None
    if found is not None:
        key, value = found
        raise InputError(f"{path}: {key} = {_shown(value)} would load code; {_NEVER}")


def _loading(said: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of what would have code loaded, anywhere in a configuration."""
    if isinstance(said, list):
        for value in said:
            yield from _loading(value, folder)
    if not isinstance(said, dict):
        return
    for key, value in said.items():
        if value is None:
            continue
        if (
            (key in _HARMLESS and value not in _HARMLESS[key])
            or (key in _OF_LIBRARIES and str(value).partition(".")[0] not in LIBRARIES)
            or (key in _OF_KERNELS and any("/" in text or ":" in text for text in _texts(value)))
            or (key in _OF_FILES and any(_is_there(text, folder) for text in _texts(value)))
        ):
            yield key, value
        yield from _loading(value, folder)


def _is_there(name: str, folder: Path) -> bool:
    """Whether a class of `auto_map` can be reached: in a file of the folder, or elsewhere.

    Models whose class went into the libraries still name the file that they had.
    """
    parts = name.split(".")
    elsewhere = not all(part.isidentifier() for part in parts)
    return elsewhere or (folder / f"{parts[0]}.py").exists()


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _parsed(text: Any) -> Any:
    """What a text holds, if it holds JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def _shown(value: Any, most: int = 60) -> str:
    try:
        text = value if isinstance(value, str) and most > 60 else repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that can't be shown"
    return text if len(text) <= most else f"{text[:most]}..."
