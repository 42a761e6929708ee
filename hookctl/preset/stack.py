"""A stack of editors as a TOML file, checked against what each recipe takes.

    model = "shapes"                # optional

    [[lora]]                        # optional: adapters of the model, which stay on throughout
    path = "striped.safetensors"    # from the folder of this file on
    weight = 0.8                    # 1 if not said

    [run]                           # optional: what the run does unless told otherwise
    prompt = "a red circle above a blue square"
    edit = "a green circle above a blue square"
    steps = 30

    [[editor]]                      # one table for each editor, in the order of the stack
    recipe = "PromptToPrompt"
    cross_replace = 0.8
    blend = ["circle", "circle"]

    [inversion]                     # optional: the run edits an image that it is given
    recipe = "DirectInversion"
    guidance = 3.0

    [program]                       # or: draws after it, by a loop of its own; may stand alone
    recipe = "CyclicOneWay"
    at = [32, 0]

The keys of an editor and their types are those of its recipe's `__init__`. What takes `prompts`
gets the prompts of the run, and what takes a `image` that of the run; an inversion gets its steps
too, and a program all that is said of the run.
"""

from __future__ import annotations

import hashlib
import inspect
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError
from hookctl.preset import toml
from hookctl.preset.signature import Mismatch, convert, describe, hints_of, parameters

if TYPE_CHECKING:
    from hookctl.editor import Editor

RUN_KEYS: Mapping[str, Any] = {
    "prompt": str,
    "edit": str | list[str],
    "negative": str,
    "seed": int,
    "steps": int,
    "guidance": float,
    "images": int,
    "width": int,
    "height": int,
}
_TOP_KEYS = ("model", "lora", "run", "inversion", "program", "editor")
_LORA_KEYS: Mapping[str, Any] = {"path": str, "weight": float}
_PROMPTS, _IMAGE = "prompts", "image"
# The parameters that a run fills, and how what they say is said to it.
_GIVEN: Mapping[str, str] = {
    _PROMPTS: "write prompt = and edit = in [run], or give --prompt and --edit",
    _IMAGE: "give --image",
}
_GIVEN_TO_INVERSIONS: Mapping[str, str] = {
    "pipe": "write model = at the top, or give --model",
    _IMAGE: "give --image",
    "prompt": "write prompt = in [run], or give --prompt",
    "steps": "write steps = in [run], or give --steps",
}
_GIVEN_TO_PROGRAMS: Mapping[str, str] = {
    **_GIVEN_TO_INVERSIONS,
    **{
        name: f"write {name} = in [run], or give --{name}"
        for name in ("guidance", "negative", "seed")
    },
    "size": "write width = and height = in [run], or give --width and --height",
}


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank weights for the model, and how strongly they are added."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class EditorSpec:
    """One editor of a stack: its class, the arguments of the file and where they stand."""

    recipe: str
    cls: type[Editor]
    arguments: Mapping[str, Any]
    where: str = ""

    @property
    def takes_prompts(self) -> bool:
        return _PROMPTS in parameters(self.cls)

    @property
    def takes_image(self) -> bool:
        return _IMAGE in parameters(self.cls)

    def make(self, prompts: Sequence[str], image: Any = None) -> Editor:
        """The editor, for these prompts; InputError says where in the file an argument is wrong."""
        keywords = dict(self.arguments)
        positional: list[Any] = []
        for name, parameter in parameters(self.cls).items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional = list(keywords.pop(name, ()))
        if self.takes_prompts:
            keywords[_PROMPTS] = list(prompts)
        if self.takes_image:
            keywords[_IMAGE] = image
        with _naming(self.where):
            return self.cls(*positional, **keywords)


@dataclass(frozen=True)
class ImageSpec:
    """What a run does with its image, an inversion or a program: a class, the arguments of the
    file and where they stand."""

    recipe: str
    cls: type[Any]
    arguments: Mapping[str, Any]
    where: str = ""

    def make(self, pipe: Any, image: Any, prompt: str, **run: Any) -> Any:
        """The class's object, to be run; InputError says where in the file an argument is wrong.

        run: what else the run gives it.
        """
        with _naming(self.where):
            return self.cls(pipe, image, prompt, **run, **self.arguments)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """The errors of a recipe, led by where in a file it stands."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None


@dataclass(frozen=True)
class Preset:
    """What a file says: which editors, and the arguments of a run (keys of RUN_KEYS).

    loras: adapters of the model; inversion: of the image that is edited; program: that draws
    round the image, or another form of it; None if the pipeline itself draws, from noise.
    """

    specs: tuple[EditorSpec, ...]
    run: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    loras: tuple[LoraSpec, ...] = ()
    inversion: ImageSpec | None = None
    program: ImageSpec | None = None
    path: Path | None = None
    sha256: str | None = None

    @property
    def takes_prompts(self) -> bool:
        """Whether an editor compares prompts, so that a run needs an edit."""
        return any(spec.takes_prompts for spec in self.specs)

    @property
    def takes_image(self) -> bool:
        """Whether a run needs an image."""
        begun = self.inversion or self.program
        return begun is not None or any(spec.takes_image for spec in self.specs)

    def editors(self, prompts: Sequence[str] = (), image: Any = None) -> list[Editor]:
        """New editors for a run of these prompts (the source, then its edits) and its image."""
        return [spec.make(prompts, image) for spec in self.specs]


def load_preset(
    path: Path | str,
    recipes: Mapping[str, type[Editor]],
    inversions: Mapping[str, type[Any]] | None = None,
    programs: Mapping[str, type[Any]] | None = None,
) -> Preset:
    """Read a stack; `recipes` are the editors that it may name, `inversions` and `programs` what
    it may do with an image.

    Raises FileNotFoundError if there is no such file, and InputError, with the file, the key and
    what would do, for anything in it that is wrong.
    """
    path = existing(Path(path))
    content = path.read_bytes()
    try:
        data = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text in UTF-8; give a stack of editors in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not TOML: {error}") from None
    _known(data, _TOP_KEYS, str(path), "a stack")
    model = data.get("model")
    if model is not None:
        model = _typed(model, str, f"{path}: model")
    loras = _loras(data.get("lora", []), path)
    run = _run(data.get("run", {}), path)
    begun = {
        "inversion": _begun(data, "inversion", inversions or {}, _GIVEN_TO_INVERSIONS, path),
        "program": _begun(data, "program", programs or {}, _GIVEN_TO_PROGRAMS, path),
    }
    if all(begun.values()):
        raise InputError(f"{path}: both [inversion] and [program] take the image; give one")
    alone = begun["program"] is not None and "editor" not in data
    return Preset(
        () if alone else tuple(_editors(data.get("editor"), recipes, path)),
        run,
        model,
        loras,
        **begun,
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def existing(path: Path) -> Path:
    """The path, if there is such a file; else FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give a stack of editors in TOML")
    return path


def _loras(tables: Any, path: Path) -> tuple[LoraSpec, ...]:
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InputError(
            f'{path}: lora = {tables!r}; write a table for each, such as [[lora]] path = "..."'
        )
    found = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[lora]] {number}"
        _known(table, _LORA_KEYS, where, "a LoRA")
        if "path" not in table:
            raise InputError(f"{where}: needs path (a text)")
        said = {
            key: _typed(value, _LORA_KEYS[key], f"{where} {key}") for key, value in table.items()
        }
        found.append(LoraSpec(path.parent / said["path"], said.get("weight", 1.0)))
    return tuple(found)


def _run(table: Any, path: Path) -> dict[str, Any]:
    where = f"{path}: [run]"
    if not isinstance(table, dict):
        raise InputError(f"{where}: {table!r} given; a table expected, such as [run] steps = 30")
    _known(table, RUN_KEYS, where, "a run")
    return {key: _typed(value, RUN_KEYS[key], f"{where} {key}") for key, value in table.items()}


def _editors(tables: Any, recipes: Mapping[str, type[Editor]], path: Path) -> Sequence[EditorSpec]:
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables) or not tables:
        raise InputError(
            f"{path}: holds no editor; write a table for each, such as "
            f'[[editor]] recipe = "{next(iter(recipes), "...")}"'
        )
    found = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[editor]] {number}"
        name = _named(table, recipes, where)
        where = f"{where} ({name})"
        arguments = _checked(table, recipes[name], where, _GIVEN)
        found.append(EditorSpec(name, recipes[name], arguments, where))
    return found


def _begun(
    data: Mapping[str, Any],
    key: str,
    classes: Mapping[str, type[Any]],
    given: Mapping[str, str],
    path: Path,
) -> ImageSpec | None:
    """What a file says under `key` to do with the image."""
    table, where = data.get(key), f"{path}: [{key}]"
    if table is None:
        return None
    if not isinstance(table, dict):
        raise InputError(
            f"{where}: {table!r} given; a table expected, such as [{key}] "
            f'recipe = "{next(iter(classes), "...")}"'
        )
    name = _named(table, classes, where)
    where = f"{where} ({name})"
    return ImageSpec(name, classes[name], _checked(table, classes[name], where, given), where)


def _named(table: Mapping[str, Any], known: Mapping[str, Any], where: str) -> str:
    """The recipe that a table names."""
    name = table.get("recipe")
    if not isinstance(name, str):
        raise InputError(f"{where}: recipe is missing; give one of: {', '.join(known)}")
    if name not in known:
        raise InputError(
            f"{where}: recipe={name!r} is not known{_near(name, known)}; there are: "
            f"{', '.join(known)}"
        )
    return name


def _checked(
    table: Mapping[str, Any], cls: type, where: str, given: Mapping[str, str]
) -> dict[str, Any]:
    """The arguments in the table of a recipe, with the types that its `__init__` wants.

    given: the parameters that the run fills, and what to write instead.
    """
    arguments = {key: value for key, value in table.items() if key != "recipe"}
    taken = parameters(cls)
    for name, instead in given.items():
        if name in arguments and name in taken:
            verb = "belong" if name.endswith("s") else "belongs"
            raise InputError(f"{where}: {name} {verb} to the run; {instead}")
    allowed = [name for name in taken if name not in given]
    _known(arguments, allowed, where, cls.__name__)
    missing = [
        name
        for name in allowed
        if taken[name].default is inspect.Parameter.empty
        and taken[name].kind is not inspect.Parameter.VAR_POSITIONAL
        and name not in arguments
    ]
    hints = hints_of(cls)
    if missing:
        wanted = ", ".join(f"{name} ({describe(hints.get(name, Any))})" for name in missing)
        raise InputError(f"{where}: needs {wanted}")
    checked = {}
    for name, value in arguments.items():
        hint = hints.get(name, Any)
        if taken[name].kind is inspect.Parameter.VAR_POSITIONAL:
            hint = list[hint]  # type: ignore[valid-type]
        checked[name] = _typed(value, hint, f"{where} {name}")
    return checked


def _typed(value: Any, hint: Any, where: str) -> Any:
    try:
        return convert(value, hint)
    except Mismatch:
        raise InputError(f"{where} = {value!r}; give {describe(hint)}") from None


def _known(given: Mapping[str, Any], allowed: Any, where: str, owner: str) -> None:
    for key in given:
        if key not in allowed:
            raise InputError(
                f"{where}: {key!r} is not a key of {owner}{_near(key, allowed)}; there are: "
                f"{', '.join(allowed)}"
            )


def _near(name: str, known: Any) -> str:
    lower = {one.lower(): one for one in known}
    near = [lower[m] for m in get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


# -- writing ---------------------------------------------------------------------------------------


def dump_preset(preset: Preset) -> str:
    """The TOML text that `load_preset` reads back as the same stack."""
    lines = [] if preset.model is None else [*toml.pairs({"model": preset.model}), ""]
    for lora in preset.loras:
        lines += ["[[lora]]", *toml.pairs({"path": str(lora.path), "weight": lora.weight}), ""]
    if preset.run:
        lines += ["[run]", *toml.pairs(preset.run), ""]
    for key, begun in (("inversion", preset.inversion), ("program", preset.program)):
        if begun is not None:
            lines += [f"[{key}]", *_recipe(begun)]
    for spec in preset.specs:
        lines += ["[[editor]]", *_recipe(spec)]
    return "\n".join(lines)


def _recipe(spec: EditorSpec | ImageSpec) -> list[str]:
    return [*toml.pairs({"recipe": spec.recipe, **spec.arguments}), ""]
