from __future__ import annotations

import numpy as np
import pytest

from hookctl.address.regions import Region
from hookctl.errors import InputError
from hookctl.learned import locations


def test_boxes_however_they_are_written():
    want = (0.1, 0.2, 0.5, 0.6)
    for given in (want, list(want), Region.box(*want), "box:0.1,0.2,0.5,0.6"):
        assert locations.box_of(given, "box") == want


@pytest.mark.parametrize("given", ["point:0.5,0.5", (0.1, 0.2), (0.5, 0.5, 0.1, 0.1), (0, 0, 2, 1)])
def test_what_is_no_box_is_refused_by_name(given):
    with pytest.raises(InputError, match=r"objects\[1\]"):
        locations.box_of(given, "objects[1]")


@pytest.mark.parametrize("given", [(0.1,), (0.1, 0.2, 0.3), "0.1,0.2", (0.5, 1.2), 0.5, ("a", 1)])
def test_what_is_no_point_is_refused_by_name(given):
    with pytest.raises(InputError, match=r"instances\[0\]\.point"):
        locations.point_of(given, "instances[0].point")


@pytest.mark.parametrize("given", [[(0.1, 0.2)], [], (0.1, 0.2), [(0.1, 0.2), (0.3, -1)], "a line"])
def test_what_is_no_stroke_is_refused_by_name(given):
    with pytest.raises(InputError, match="scribble"):
        locations.scribble_of(given, 20, "scribble")


@pytest.mark.parametrize("given", [np.zeros((1, 4, 4)), np.zeros((4, 4)), np.full((4, 4), 3.0), 7])
def test_what_is_no_mask_is_refused_by_name(given):
    with pytest.raises(InputError, match=r"instances\[2\]\.mask"):
        locations.mask_of(given, 8, "instances[2].mask")


def test_masks_of_any_size_are_brought_to_the_canvas():
    small = np.zeros((4, 6))
    small[1:3, 2:4] = 1
    mask = locations.mask_of(small, 12, "mask")
    want = np.zeros((12, 12), bool)
    want[3:9, 4:8] = True
    assert np.array_equal(mask, want)
    assert locations.box_of_mask(mask) == (4 / 12, 3 / 12, 8 / 12, 9 / 12)


def test_a_stroke_is_resampled_evenly_and_sorted():
    points = locations.scribble_of([(0.9, 0.9), (0.9, 0.1), (0.1, 0.1)], 17, "scribble")
    assert points.shape == (17, 2)
    distances = np.hypot(*points.T)
    assert (np.diff(distances) >= 0).all()
    assert np.allclose(points[0], (0.1, 0.1)) and np.allclose(points[-1], (0.9, 0.9))
    on_it = np.isclose(points[:, 0], 0.9) | np.isclose(points[:, 1], 0.1)
    assert on_it.all() and np.allclose(sorted(points[:, 0])[:9], np.linspace(0.1, 0.9, 9))


def contour_pixels(mask):
    """The pixels outside of a mask that share a side with it: what its contours go through."""
    padded = np.pad(mask, 1)
    near = np.zeros_like(padded)
    for axis in (0, 1):
        for shift in (1, -1):
            near |= np.roll(padded, shift, axis)
    return {(y - 1, x - 1) for y, x in np.argwhere(near & ~padded)}


def lone_holes(mask):
    """Holes of one pixel, whose contour is a point, and which no other contour passes."""
    padded = np.pad(mask, 2)
    found = set()
    for y, x in contour_pixels(mask):
        near = padded[y + 1 : y + 4, x + 1 : x + 4]
        if near[0, 1] and near[2, 1] and near[1, 0] and near[1, 2] and near.sum() == 8:
            found.add((y, x))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_contours_go_once_round_everything_closed_and_without_jumps(seed):
    mask = np.random.default_rng(seed).random((9, 12)) < 0.55
    found = list(locations.contours(mask))
    visited = set()
    for contour in found:
        assert np.array_equal(contour[0], contour[-1])
        steps = np.abs(np.diff(contour, axis=0)).max(1)
        assert (steps == 1).all()
        visited |= {(int(y), int(x)) for y, x in contour}
    assert visited == contour_pixels(mask) - lone_holes(mask)


def test_the_contour_of_a_rectangle():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:5] = True
    (contour,) = locations.contours(mask)
    want = [(0, 2), (0, 3), (0, 4), (1, 5), (2, 5), (3, 4), (3, 3), (3, 2), (2, 1), (1, 1), (0, 2)]
    assert [(int(y), int(x)) for y, x in contour] == want


def test_a_hole_has_a_contour_of_its_own_and_corners_do_not_join():
    ring = np.ones((5, 5), bool)
    ring[1:4, 1:4] = False
    assert len(list(locations.contours(ring))) == 2
    corners = np.eye(3, dtype=bool)
    assert len(list(locations.contours(corners))) == 3


def test_points_of_a_mask_lie_on_and_in_it_nearest_first():
    yy, xx = np.mgrid[:64, :64]
    disc = (yy - 40) ** 2 + (xx - 20) ** 2 < 12**2
    points = locations.points_of_mask(disc, 256)
    assert points.shape == (256, 2)
    distances = np.hypot(*points.T)
    assert (np.diff(distances) >= 0).all()
    pixels = np.rint(points * 64).astype(int)
    inside = disc[pixels[:, 1], pixels[:, 0]]
    assert inside.sum() == 128
    outside = {(int(y), int(x)) for x, y in pixels[~inside]}
    assert outside <= contour_pixels(disc)
    # Inside, the points are spread from the middle to the rim.
    away = np.sort(np.hypot(pixels[inside, 0] - 20, pixels[inside, 1] - 40))
    assert away[0] < 2 and away[-1] > 10


def test_a_mask_of_few_pixels_gives_as_many_points():
    mask = np.zeros((16, 16), bool)
    mask[0, 0] = mask[0, 1] = True
    points = locations.points_of_mask(mask, 256)
    assert points.shape == (256, 2) and points.min() >= 0 and points.max() <= 1
    assert locations.scribble_of_mask(mask, 20).shape == (20, 2)
    everything = np.ones((16, 16), bool)
    assert locations.points_of_mask(everything, 256).max() <= 1


def test_the_scribble_of_a_mask_lies_in_it():
    mask = np.zeros((32, 32), bool)
    mask[8:24, 4:12] = True
    points = locations.scribble_of_mask(mask, 20)
    pixels = np.rint(points * 32).astype(int)
    assert mask[pixels[:, 1], pixels[:, 0]].all()
    assert (np.diff(np.hypot(*points.T)) >= 0).all()
