"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Where to write a file, which takes its place when all of it is written.

    Where that fails nothing of it is left, and what stood there before stays; InputError names the
    file. A device is written to as it stands.
    """
    part = path.with_name(f".part-{os.getpid()}-{path.name}")  # its suffix says the format
    if path.exists() and not path.is_file() and not path.is_dir():
        part = path
    try:
        yield part
        if part != path:
            part.replace(path.resolve())
    except (OSError, ValueError) as error:  # ValueError: of a null byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: can't be written ({reason}); give another folder, or make room"
        ) from error
    finally:
        if part != path or path.is_symlink():
            with suppress(OSError, ValueError):
                part.unlink()


def write_text(path: Path, text: str) -> None:
    with writing(path) as part:
        part.write_text(text, "utf-8")


def write_json(path: Path, data: Any) -> None:
    """Data as JSON; what JSON has no form for is written as its text."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def save_image(image: Image, path: Path, **options: Any) -> None:
    """options: of the format."""
    with writing(path) as part:
        image.save(part, **options)
