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


def face(checkpoint: Checkpoint, pipe: Any, *, version: int, strength: float = 1.0) -> Editor:
    if version not in (1, 2):
        raise InputError(f"version={version}; give 1 or 2")
    return Built(checkpoint, pipe, {"version": version})


def anything(checkpoint: Checkpoint, pipe: Any, **options: Any) -> Editor:
    return Built(checkpoint, pipe, options)
