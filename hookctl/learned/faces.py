"""Faces in a picture, found by the user's own face analysis (an optional extra).

InstantID and IP-Adapter FaceID were trained on embeddings of insightface: InstantID on them as they
are (`embedding`), FaceID on them at length 1 (`normalised`). insightface's models are licensed for
research alone, and nothing here downloads them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hookctl.address.regions import Region
from hookctl.arguments import check_image
from hookctl.errors import HookctlWarning, InputError, UnsupportedError

ARC_FACE = 512  # channels of an embedding
_DETECTION = (640, 640)  # px


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture.

    embedding: as the network gives it [channels]; keypoints: both eyes, nose and both corners of
    the mouth [5, 2], and box: (x0, y0, x1, y1), as fractions of the picture.
    """

    embedding: Tensor
    keypoints: Tensor
    box: tuple[float, float, float, float]

    @property
    def normalised(self) -> Tensor:
        """The embedding at length 1."""
        return self.embedding / self.embedding.norm()

    def region(self, margin: float = 0.5) -> Region:
        """The box, grown on every side by a share of its width and height."""
        x0, y0, x1, y1 = self.box
        dx, dy = margin * (x1 - x0), margin * (y1 - y0)
        return Region.box(
            max(0.0, x0 - dx), max(0.0, y0 - dy), min(1.0, x1 + dx), min(1.0, y1 + dy)
        )


def find_face(image: Image.Image, analysis: Any) -> Face:
    """The largest face in a picture.

    analysis: `insightface.app.FaceAnalysis`, prepared, or what has its `get`. Raises InputError if
    there is no face.
    """
    picture = check_image(image, "find_face: image").convert("RGB")
    bgr = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])  # as it was trained
    found = analysis.get(bgr)
    if not found:
        raise InputError(
            f"find_face: no face found in an image of {picture.width} x {picture.height} px; give "
            "one in which a face is larger, or leave more room round it"
        )
    face = max(found, key=lambda one: _area(one.bbox))
    size = torch.tensor([picture.width, picture.height], dtype=torch.float64)
    box = torch.as_tensor(np.asarray(face.bbox[:4]), dtype=torch.float64).reshape(2, 2) / size
    x0, y0, x1, y1 = box.clamp(0, 1).flatten().tolist()
    return Face(
        torch.as_tensor(np.asarray(face.embedding)).float().flatten(),
        torch.as_tensor(np.asarray(face.kps)).double() / size,
        (x0, y0, x1, y1),
    )


def face_analysis(root: str | Path, name: str = "antelopev2") -> Any:
    """insightface's analysis with model files that the user has, in root/models/name.

    antelopev2 is InstantID's, buffalo_l FaceID's. Raises InputError if they are not there,
    UnsupportedError without insightface.
    """
    folder = Path(root) / "models" / name
    if not any(folder.glob("*.onnx")):
        raise InputError(
            f"face_analysis: no *.onnx in {folder}; put insightface's {name} there (its licence "
            "allows research alone)"
        )
    try:
        from insightface.app import FaceAnalysis  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UnsupportedError(
            "face_analysis: insightface is not installed; pip install insightface onnxruntime, or "
            "give embeddings and keypoints"
        ) from None
    analysis: Any = FaceAnalysis(name=name, root=str(root))
    analysis.prepare(ctx_id=0, det_size=_DETECTION)
    return analysis


def check_length(embedding: Any, name: str, *, normalised: bool) -> None:
    """Warn of an ArcFace embedding that seems to be of the other length.

    normalised: whether the adapter was trained on embeddings of length 1. To mix them up raises
    nothing and fails quietly.
    """
    x = (
        torch.as_tensor(np.asarray(embedding.detach().cpu().float()))
        if isinstance(embedding, Tensor)
        else torch.as_tensor(np.asarray(embedding)).float()
    )
    if x.shape[-1] != ARC_FACE:
        return
    is_one = bool(((x.norm(dim=-1) - 1).abs() < 1e-2).all())
    if is_one and not normalised:
        warnings.warn(
            f"{name}: an embedding of length 1, but InstantID was trained on embeddings as the "
            "network gives them (face.embedding, length about 20)",
            HookctlWarning,
            stacklevel=2,
        )
    if normalised and not is_one and bool((x != 0).any()):
        warnings.warn(
            f"{name}: an embedding of length {float(x.norm(dim=-1).max()):.3g}, but FaceID was "
            "trained on embeddings of length 1 (face.normed_embedding)",
            HookctlWarning,
            stacklevel=2,
        )


def _area(box: Any) -> float:
    x0, y0, x1, y1 = (float(value) for value in box[:4])
    return (x1 - x0) * (y1 - y0)
