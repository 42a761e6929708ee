"""The picture of five points: pixel by pixel as OpenCV draws it."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from hookctl.learned.keypoints import COLOURS, draw_keypoints

FACES = {
    "upright": [(40, 44), (88, 46), (64, 70), (46, 96), (82, 97)],
    "turned": [(30.7, 90.2), (60.1, 40.9), (75.5, 80.3), (80, 110.4), (101.6, 66.6)],
    "flat": [(20, 60), (108, 60), (64, 60), (30, 60), (98, 60)],
    "together": [(64, 64)] * 5,
    "far": [(12, 12), (115, 20), (64, 64), (15, 115), (114, 112)],
}
# Of the bytes that ellipse2Poly, fillConvexPoly and circle of OpenCV 5.0 gave, on 128 x 128 px.
OPENCV = {
    "upright": 2867825769,
    "turned": 1510718736,
    "flat": 2963104853,
    "together": 1977258634,
    "far": 1303846682,
}


@pytest.mark.parametrize("name", FACES)
def test_as_opencv_draws_it(name: str) -> None:
    picture = np.asarray(draw_keypoints([FACES[name]], 128, 128))
    assert zlib.crc32(picture.tobytes()) == OPENCV[name]


def test_points_are_bright_and_limbs_dimmed() -> None:
    picture = np.asarray(draw_keypoints([FACES["upright"]], 128, 128))
    for (x, y), colour in zip(FACES["upright"], COLOURS, strict=True):
        assert tuple(picture[y, x]) == colour
    assert tuple(picture[57, 52]) == (153, 0, 0)  # between the first eye and the nose
    assert int((picture.any(-1)).sum()) > 5 * 314  # discs of radius 10


def test_no_face_is_black_and_size_is_the_pictures() -> None:
    picture = np.asarray(draw_keypoints([], 96, 64))
    assert picture.shape == (64, 96, 3) and not picture.any()


def test_points_outside_are_cut_off() -> None:
    inside = np.asarray(
        draw_keypoints([[(-30, 20), (40, -25), (60, 60), (150, 70), (64, 200)]], 128, 128)
    )
    assert inside.any()


def test_two_faces_are_drawn_over_each_other() -> None:
    first, second = FACES["upright"], [(x + 30, y + 10) for x, y in FACES["upright"]]
    both = np.asarray(draw_keypoints([first, second], 160, 128))
    alone = np.asarray(draw_keypoints([second], 160, 128))
    bright = (alone == 255).any(-1)
    assert (both[bright] == alone[bright]).all()
