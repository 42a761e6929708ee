"""Tables of a stack's file: pictures, embeddings, faces and places by the files that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hookctl.arguments import opened, shown
from hookctl.errors import InputError
from hookctl.learned.faces import Face, face_analysis, find_face
from hookctl.learned.files import read
from hookctl.learned.image_encoder import encoder_in
from hookctl.learned.reading.located import ENDINGS

NUMPY = ".npy"


def names_tensor(given: Any) -> bool:
    """Whether something names a file of numbers, rather than a picture."""
    return isinstance(given, str | Path) and Path(given).suffix in (NUMPY, *ENDINGS)


def tensor_in(given: Any, name: str) -> Any:
    """What was given, or the one tensor in the file that it names; no code in a file is run.

    InputError for a file that can't be read, or holds several.
    """
    if not isinstance(given, str | Path):
        return given
    file = Path(given)
    try:
        if file.suffix == NUMPY:
            return np.load(file, allow_pickle=False)
        tensors = list(read(file).tensors.values())
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{name}: {shown(str(file))} can't be read: {error}") from None
    if len(tensors) != 1:
        raise InputError(f"{name}: {file} holds {len(tensors)} tensors; give a file of one")
    return tensors[0]


def region_in(given: Any) -> Any:
    """What was given as a region; the mask in a file that it names, as a region is written."""
    return f"mask:{given}" if isinstance(given, str | Path) and _is_file(given) else given


def _is_file(text: str | Path) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a text that can be no path
        return False


def with_files(options: Mapping[str, Any], who: str) -> dict[str, Any]:
    """Options of `IPAdapter`, with what is in the files that they name. Raises InputError."""
    given = dict(options)
    given["negative"] = tensor_in(given.get("negative"), f"{who}: negative")
    given["image_encoder"] = encoder_in(given.get("image_encoder"), f"{who}: image_encoder")
    return given


class Faces:
    """Finds faces in files of pictures.

    analysis: what finds them (`find_face`), or the folder of its models (`face_analysis`), which is
    opened once, when the first picture needs it; None for no pictures.
    """

    def __init__(self, analysis: Any) -> None:
        self._analysis = analysis

    def find(self, picture: Any, name: str) -> Face:
        """The largest face in a picture, or in its file. Raises InputError."""
        if self._analysis is None:
            raise InputError(
                f"{name}: to find a face in a picture takes analysis=, the folder of insightface's "
                "models; or give the embedding and key points"
            )
        if isinstance(self._analysis, str | Path):
            self._analysis = face_analysis(self._analysis)
        image = opened(picture, name)
        try:
            return find_face(image, self._analysis)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
