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
from hookctl.arguments import is_list, refusal
from hookctl.errors import InputError
from hookctl.learned.tables import Faces, region_in, tensor_in

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
    return _with_people(given, Faces(analysis), name)


def _with_people(given: Any, faces: Faces, name: str) -> Any:
    if isinstance(given, Mapping):
        return _person(given, faces, name)
    if not is_list(given):
        return given
    return [_with_people(one, faces, f"{name}[{i}]") for i, one in enumerate(given)]


def _person(table: Mapping[str, Any], faces: Faces, name: str) -> Person:
    if not set(table) <= set(_KEYS):
        raise refusal(name, dict(table), f"a table of {', '.join(_KEYS)}")
    if ("image" in table) == ("embedding" in table):
        raise InputError(f"{name}: give either image, a picture of the face, or embedding")
    given = dict(table)
    if "image" in given:
        given["embedding"] = faces.find(given.pop("image"), f"{name}.image").embedding
    else:
        given["embedding"] = tensor_in(given["embedding"], f"{name}.embedding")
    points = given.get("keypoints")
    if isinstance(points, str | Path):
        given["keypoints"] = faces.find(points, f"{name}.keypoints").keypoints
    given["region"] = region_in(given.get("region"))
    return Person(**given)
