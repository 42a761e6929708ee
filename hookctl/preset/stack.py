"""What a file says: the editors of a stack, what is done with an image, and the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError
from hookctl.preset.signature import parameters

if TYPE_CHECKING:
    from hookctl.editor import Editor

# The parameters that a run fills, by the table that a recipe stands in.
FILLED = {
    "editor": ("prompts", "image"),
    "inversion": ("pipe", "image", "prompt", "steps"),
    "program": (
        "pipe", "image", "prompt", "prompts", "source_prompt", "steps", "guidance", "negative",
        "seed", "size",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank weights for the model, and how strongly they are added."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class HookSpec:
    """Learned weights that are attached as an editor: a file, or owner/name/FILE of a repository.

    strength: None for the kind's own; arguments: further options of the kind, as the file gives
    them; where they stand.
    """

    path: str
    strength: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class EditorSpec:
    """One editor of a stack: its class, the arguments of the file and where they stand.

    recipe: as the file names it, "PromptToPrompt" or "package.module:Class".
    """

    recipe: str
    cls: type[Editor]
    arguments: Mapping[str, Any]
    where: str = ""

    @property
    def takes_prompts(self) -> bool:
        return "prompts" in parameters(self.cls)

    @property
    def takes_image(self) -> bool:
        return "image" in parameters(self.cls)

    def make(self, prompts: Sequence[str], image: Any = None) -> Editor:
        """The editor, for these prompts; InputError says where in the file an argument is wrong."""
        keywords = dict(self.arguments)
        positional: list[Any] = []
        for name, parameter in parameters(self.cls).items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional = list(keywords.pop(name, ()))
        if self.takes_prompts:
            keywords["prompts"] = list(prompts)
        if self.takes_image:
            keywords["image"] = image
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

    @property
    def takes_prompts(self) -> bool:
        return "prompts" in parameters(self.cls)

    def make(self, pipe: Any, image: Any, prompt: str | list[str], **run: Any) -> Any:
        """The class's object, to be run; InputError says where in the file an argument is wrong.

        run: what else the run gives it.
        """
        with _naming(self.where):
            return self.cls(pipe, image, prompt, **run, **self.arguments)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """The errors of a recipe, led by where in a file it stands; that names the recipe already."""
    try:
        yield
    except InputError as error:
        if not where:
            raise
        recipe = where.rpartition("(")[2].removesuffix(")")
        raise type(error)(f"{where}: {str(error).removeprefix(f'{recipe}: ')}") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        if not where:
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: can't be made of these arguments: {reason}") from error


@dataclass(frozen=True)
class Preset:
    """What a file says: which editors, and the settings of a run (keys of `SETTINGS`).

    loras: adapters of the model; hooks: learned weights; inversion: of the image that is edited;
    program: that draws round the image, or another form of it; None if the pipeline itself draws,
    from noise.
    """

    specs: tuple[EditorSpec, ...]
    run: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    loras: tuple[LoraSpec, ...] = ()
    hooks: tuple[HookSpec, ...] = ()
    inversion: ImageSpec | None = None
    program: ImageSpec | None = None
    path: Path | None = None
    sha256: str | None = None

    @property
    def takes_prompts(self) -> bool:
        """Whether an editor or the program compares prompts, so that a run needs an edit."""
        compares = self.program is not None and self.program.takes_prompts
        return compares or any(spec.takes_prompts for spec in self.specs)

    @property
    def takes_image(self) -> bool:
        """Whether a run needs an image."""
        of_image = self.inversion or self.program
        return of_image is not None or any(spec.takes_image for spec in self.specs)

    def editors(self, prompts: Sequence[str] = (), image: Any = None) -> list[Editor]:
        """New editors for a run of these prompts (the source, then its edits) and its image."""
        return [spec.make(prompts, image) for spec in self.specs]
