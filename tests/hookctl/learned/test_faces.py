"""Faces in a picture, by a stand-in for insightface that says what it was given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.faces import face_analysis, find_face


class Analysis:
    """Finds a small and a large face in every picture."""

    def __init__(self, *boxes: tuple[float, ...]) -> None:
        self.boxes = boxes
        self.given: Any = None

    def get(self, bgr: Any) -> list[Any]:
        self.given = bgr
        return [
            SimpleNamespace(
                bbox=np.array(box, np.float32),
                kps=np.array([[box[0], box[1]]] * 5, np.float32),
                embedding=np.full(512, 3.0 + i, np.float32),
            )
            for i, box in enumerate(self.boxes)
        ]


def test_the_largest_face_in_fractions() -> None:
    analysis = Analysis((10, 10, 20, 20), (20, 10, 60, 50))
    picture = Image.new("RGB", (80, 100), (255, 0, 0))
    face = find_face(picture, analysis)
    assert analysis.given[0, 0].tolist() == [0, 0, 255]  # blue, green, red
    assert face.embedding[0] == 4.0 and face.embedding.shape == (512,)
    assert float(face.normalised.norm()) == pytest.approx(1)
    assert face.box == pytest.approx((0.25, 0.1, 0.75, 0.5))
    assert torch.allclose(face.keypoints[0], torch.tensor([0.25, 0.1], dtype=torch.float64))
    covered = face.region(0.5).coverage(10, 8)
    assert covered.shape == (10, 8) and covered[:, 0].sum() > 0 and covered[8].sum() == 0


def test_no_face() -> None:
    with pytest.raises(InputError, match="no face found in an image of 80 x 100 px"):
        find_face(Image.new("RGB", (80, 100)), Analysis())
    with pytest.raises(InputError, match="find_face: image='a.png'"):
        find_face("a.png", Analysis())  # type: ignore[arg-type]


def test_model_files_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no \*.onnx in .*antelopev2"):
        face_analysis(tmp_path)
    folder = tmp_path / "models" / "antelopev2"
    folder.mkdir(parents=True)
    (folder / "scrfd.onnx").touch()
    monkeypatch.setitem(__import__("sys").modules, "insightface", None)
    with pytest.raises(UnsupportedError, match="insightface is not installed"):
        face_analysis(tmp_path)
