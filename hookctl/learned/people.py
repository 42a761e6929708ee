"""The people whom `InstantID` draws: as objects, or as tables of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hookctl.address.regions import RegionLike
from hookctl.arguments import is_list, opened, refusal, shown
from hookctl.errors import InputError
from hookctl.learned.faces import Face, face_analysis, find_face
from hookctl.learned.files import read

POINTS = 5


@dataclass(frozen=True, eq=False)
class Person:
    """Somebody to be drawn.

    embedding: of the face, as the network gives it (not normalised) [channels], or several of one
        face [n, channels].
    keypoints: where both eyes, the nose and both corners of the mouth are to be, (x, y) as
        fractions of the image [5, 2]; None leaves the place free.
    region: where the person is, None for everywhere; of several people each needs one.
    scale: factor of this person's tokens beside the editor's own.
    """

    embedding: Any
    keypoints: Any = None
    region: RegionLike | None = None
    scale: float = 1.0


def points_of(given: Any, name: str) -> Tensor | None:
    """Five points (x, y) as float64 [5, 2]; InputError for anything else."""
    if given is None:
        return None
    wanted = "five points (x, y) as fractions of the image: both eyes, nose, corners of the mouth"
    try:
        points = torch.as_tensor(np.asarray(given)).double()
    except (TypeError, ValueError):
        raise refusal(name, given, wanted) from None
    if tuple(points.shape) != (POINTS, 2) or not bool(points.isfinite().all()):
        raise refusal(name, given, wanted)
    if bool((points < -1).any()) or bool((points > 2).any()):
        raise InputError(
            f"{name}: points from {float(points.min()):g} to {float(points.max()):g} given; give "
            "fractions of the image, x / width and y / height"
        )
    return points


# -- tables of a file ------------------------------------------------------------------------------

_KEYS = ("image", *(field.name for field in fields(Person)))


def people_of(given: Any, analysis: Any, name: str) -> Any:
    """What was given as people, in lists or not, with a `Person` in the place of every table.

    A table has the keys of `Person`, or in place of embedding image, a picture of the face.
    embedding is also a file (.npy, or one tensor as weights are kept), keypoints also a picture in
    which the face is where it is to be, region also a picture of a mask. analysis: what finds faces
    in pictures (`find_face`), or the folder of its models (`face_analysis`). Raises InputError.
    """
    return _with_people(given, _Faces(analysis), name)


def _with_people(given: Any, faces: _Faces, name: str) -> Any:
    if isinstance(given, Mapping):
        return _person(given, faces, name)
    if not is_list(given):
        return given
    return [_with_people(one, faces, f"{name}[{i}]") for i, one in enumerate(given)]


def _person(table: Mapping[str, Any], faces: _Faces, name: str) -> Person:
    if not set(table) <= set(_KEYS):
        raise refusal(name, dict(table), f"a table of {', '.join(_KEYS)}")
    if ("image" in table) == ("embedding" in table):
        raise InputError(f"{name}: give either image, a picture of the face, or embedding")
    given = dict(table)
    if "image" in given:
        given["embedding"] = faces.find(given.pop("image"), f"{name}.image").embedding
    elif isinstance(given["embedding"], str | Path):
        given["embedding"] = _vector(Path(given["embedding"]), f"{name}.embedding")
    points, region = given.get("keypoints"), given.get("region")
    if isinstance(points, str | Path):
        given["keypoints"] = faces.find(points, f"{name}.keypoints").keypoints
    if isinstance(region, str | Path) and _is_file(region):
        given["region"] = f"mask:{region}"
    return Person(**given)


class _Faces:
    """Finds faces in files of pictures; the analysis is opened once, when the first needs it."""

    def __init__(self, analysis: Any) -> None:
        self._analysis = analysis

    def find(self, picture: Any, name: str) -> Face:
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


def _is_file(text: str | Path) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a text that can be no path
        return False


def _vector(file: Path, name: str) -> Any:
    """The embedding in a file."""
    try:
        if file.suffix == ".npy":
            return np.load(file, allow_pickle=False)
        tensors = list(read(file).tensors.values())
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{name}: {shown(str(file))} can't be read: {error}") from None
    if len(tensors) != 1:
        raise InputError(f"{name}: {file} holds {len(tensors)} tensors; give a file of one")
    return tensors[0]
