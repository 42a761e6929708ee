"""Learned weights as they are typed, and as editors of a pipeline: `hookctl run --hook`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from hookctl.cli.common import number
from hookctl.errors import InputError
from hookctl.learned.reading.located import located
from hookctl.preset import HookSpec
from hookctl.preset.check import typed

if TYPE_CHECKING:
    from PIL.Image import Image

    from hookctl.editor import Editor
    from hookctl.learned.loading import Source

# The option of a kind that a run's image becomes; of others, but GLIGEN's, one of _USUAL.
_IMAGES = {
    "gligen spatial": "maps",
    "gligen box+text": "inpaint",
    "collaborative": "mask",
}
_USUAL = ("image", "images")


@dataclass(frozen=True)
class Attached:
    """Weights, and the editor that they became."""

    spec: HookSpec
    source: Source
    editor: Editor

    def data(self) -> dict[str, Any]:
        """For run.json."""
        said = {"path": self.spec.path, "strength": self.spec.strength, **self.spec.arguments}
        kind = self.source.kind
        return {"kind": kind.name, "base": kind.base, **said, "notes": self.source.notes}

    def lines(self) -> Iterable[str]:
        """What the file was, and what of it was used."""
        kind = self.source.kind
        yield f"{self.spec.path}: {kind.name}" + (f" for {kind.base}" if kind.base else "")
        yield from (f"  {note}" for note in self.source.notes)


def add_hook(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hook",
        action="append",
        type=_read,
        default=[],
        metavar="FILE[:S]",
        help="learned weights (hookctl inspect FILE says what they are), and their strength "
        "(default: the kind's own); may be repeated. A file, or owner/name/FILE in the hub's cache",
    )


def _read(text: str) -> HookSpec:
    path, colon, strength = text.rpartition(":")
    if colon:
        with suppress(argparse.ArgumentTypeError):  # a colon of the path
            return HookSpec(path, number(strength))
    return HookSpec(text)


def check_hooks(hooks: Sequence[HookSpec]) -> None:
    """FileNotFoundError or InputError for weights that are not there."""
    for hook in hooks:
        located(hook.path)


def attach_hooks(
    pipe: Any, hooks: Sequence[HookSpec], prompts: Sequence[str], image: Image | None
) -> list[Attached]:
    """The editors of weights; InputError for those that don't fit the pipeline."""
    return [_attached(pipe, hook, list(prompts), image) for hook in hooks]


def _attached(pipe: Any, spec: HookSpec, prompts: list[str], image: Image | None) -> Attached:
    from hookctl.learned.loading import attach, builder_of, open_source, options_of

    where = spec.where or f"--hook {spec.path}"
    try:
        given = dict(spec.arguments)
        source = open_source(spec.path, pipe, weights=given.pop("weights", None))
        taken, hints = options_of(source.kind), dict[str, Any]()
        with suppress(NameError):  # types that are imported for checks only
            hints = get_type_hints(builder_of(source.kind))
        given = {
            name: typed(value, hints.get(name, Any), f"{where} {name}")
            for name, value in given.items()
        }
        if "prompts" in taken:
            given.setdefault("prompts", prompts)
        named = _image_option(source.kind.name, taken)
        if image is not None and named is not None:
            given.setdefault(named, image)
        if spec.strength is not None:  # IP-Adapters call it their scale
            given["scale" if "scale" in taken else "strength"] = spec.strength
        return Attached(spec, source, attach(source, pipe, **given))
    except InputError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error.__cause__


def takes_image(attached: Sequence[Attached]) -> bool:
    """Whether weights read the run's image."""
    from hookctl.learned.loading import options_of

    kinds = [one.source.kind for one in attached]
    return any(_image_option(kind.name, options_of(kind)) for kind in kinds)


def _image_option(kind: str, options: Collection[str]) -> str | None:
    named = (_IMAGES.get(kind),) if kind.startswith("gligen") else (_IMAGES.get(kind), *_USUAL)
    return next((name for name in named if name in options), None)
