"""Builders in place of the true ones: what a file is does not depend on what is made of it."""

from __future__ import annotations

from typing import Any

from hookctl.editor import Editor
from hookctl.errors import InputError
from hookctl.learned.files import Checkpoint


class Built(Editor):
    """Keeps what it was made of."""

    def __init__(self, checkpoint: Checkpoint, pipe: Any, options: dict[str, Any]) -> None:
        self.checkpoint, self.pipe, self.options = checkpoint, pipe, options


def build(
    checkpoint: Checkpoint, pipe: Any, *, strength: float = 1.0, boxes: list[Any] | None = None
) -> Editor:
    return Built(checkpoint, pipe, {"strength": strength, "boxes": boxes})


def face(checkpoint: Checkpoint, pipe: Any, *, shortcut: bool, strength: float = 1.0) -> Editor:
    if not isinstance(shortcut, bool):
        raise InputError(f"shortcut={shortcut}; give True or False")
    return Built(checkpoint, pipe, {"shortcut": shortcut})


class Scaled(Built):
    """Its keywords are what its builder hands on."""

    def __init__(
        self, checkpoint: Checkpoint, pipe: Any, images: Any, *, scale: float = 1.0, **options: Any
    ) -> None:
        super().__init__(checkpoint, pipe, {"images": images, "scale": scale, **options})


class Masked(Scaled):
    def __init__(self, *given: Any, mask: Any = None, **options: Any) -> None:
        super().__init__(*given, **options)


def handing_on(checkpoint: Checkpoint, pipe: Any, *, images: Any = None, **options: Any) -> Masked:
    return Masked(checkpoint, pipe, images, **options)
