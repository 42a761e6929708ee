"""Regions: areas are right on every grid, thin ones survive, sets are sets, errors speak."""

import math
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from hookctl.address.regions import BACKGROUND, Region, bit, bit_sets, parse_region
from hookctl.errors import InputError

GRIDS = [(1, 1), (8, 8), (5, 13), (24, 16), (64, 64)]
STAR = [(0.5 + 0.45 * math.sin(4 * math.pi * i / 5), 0.5 - 0.45 * math.cos(4 * math.pi * i / 5))
        for i in range(5)]  # fmt: skip


def area(region: Region, grid: tuple[int, int]) -> float:
    """The share of the canvas that the coverage adds up to."""
    coverage = region.coverage(*grid)
    assert coverage.shape == grid and coverage.dtype == torch.float32
    assert coverage.min() >= 0 and coverage.max() <= 1
    return float(coverage.double().mean())


@pytest.mark.parametrize("grid", GRIDS)
def test_exact_areas(grid: tuple[int, int]) -> None:
    assert area(Region.full(), grid) == 1
    assert area(Region.box(0.13, 0.2, 0.47, 0.91), grid) == pytest.approx(0.34 * 0.71, rel=1e-5)
    triangle = Region.polygon([(0.1, 0.2), (0.9, 0.4), (0.3, 0.7)])
    assert area(triangle, grid) == pytest.approx(0.18, rel=1e-5)
    soft = torch.rand(7, 10, generator=torch.Generator().manual_seed(0))
    assert area(Region.mask(soft), grid) == pytest.approx(float(soft.mean()), rel=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("radius", [0.0001, 0.002, 0.05, 0.3])
def test_round_areas(grid: tuple[int, int], radius: float) -> None:
    """Radii and widths count in shorter sides: in cells, the shape is the same on any grid."""
    h, w = grid
    side = min(h, w) / math.sqrt(h * w)  # of a canvas of area 1
    disc = math.pi * (radius * side) ** 2
    assert area(Region.point(0.5, 0.5, radius), grid) == pytest.approx(disc, rel=0.25)
    line = Region.scribble([(0.3, 0.5), (0.7, 0.5)], width=2 * radius)
    want = 0.4 * w / math.sqrt(h * w) * 2 * radius * side + disc
    assert area(line, grid) == pytest.approx(want, rel=0.02)


def test_coverage_is_where_it_should_be() -> None:
    """Rows are y: a box in the upper right corner; a half-covered edge."""
    coverage = Region.box(0.5, 0.0, 1.0, 0.375).coverage(4, 2)
    assert coverage.tolist() == [[0, 1], [0, 0.5], [0, 0], [0, 0]]
    assert Region.box(0.5, 0.0, 1.0, 0.25).tokens(4, 2).tolist() == [False, True] + [False] * 6
    dot = Region.point(0.9, 0.1, 0.02).coverage(5, 9)
    assert dot.argmax() == 8 and (dot > 1e-9).sum() == 1
    image = Image.new("L", (3, 2))
    image.putpixel((2, 0), 255)
    assert Region.mask(image).coverage(2, 3).tolist() == [[0, 0, 1], [0, 0, 0]]
    assert Region.mask(np.eye(2, dtype=np.uint8)).coverage(2, 2).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (9, 6)])
def test_a_polygon_agrees_with_its_samples(grid: tuple[int, int]) -> None:
    """Per cell, with a concave outline that crosses itself (even-odd: the star has a hole)."""
    star = Region.polygon(STAR)
    sampled = (star & Region.full()).coverage(*grid)
    torch.testing.assert_close(star.coverage(*grid), sampled, atol=0.02, rtol=0)
    assert not (star & Region.point(0.5, 0.5, 0.1)).outline.inside(64, 64).any()


def test_a_polygon_that_is_a_box() -> None:
    corners = [(0.13, 0.2), (0.47, 0.2), (0.47, 0.91), (0.13, 0.91)]
    torch.testing.assert_close(
        Region.polygon(corners).coverage(7, 5), Region.box(0.13, 0.2, 0.47, 0.91).coverage(7, 5)
    )


@pytest.mark.parametrize(
    "region",
    [
        Region.box(0.3, 0.3, 0.3001, 0.3001),
        Region.box(0.0, 0.4999, 1.0, 0.5001),
        Region.box(0.9999, 0.9999, 1.0, 1.0),
        Region.point(0.0, 0.0, 1e-4),
        Region.point(1.0, 1.0, 1e-4),
        Region.scribble([(0.0, 0.1), (1.0, 0.2)], width=1e-4),
        Region.polygon([(0.1, 0.31), (0.9, 0.31), (0.9, 0.3101)]),
        Region.polygon([(0.31, 0.1), (0.31, 0.9), (0.3101, 0.9)]),
        Region.polygon([(0.0, 0.0), (1.0, 1.0), (1.0, 0.9999)]),
        Region.mask(np.eye(300)[:1] * 0.01),
    ],
    ids=lambda region: type(region.outline).__name__,
)
@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_vanishes_on_a_coarse_grid(region: Region, grid: tuple[int, int]) -> None:
    tokens = region.tokens(*grid)
    coverage = region.coverage(*grid).flatten()
    assert tokens.dtype == torch.bool and tokens.shape == (grid[0] * grid[1],)
    assert tokens[coverage.argmax()] and not tokens[coverage == 0].any()


def test_a_thin_line_stays_a_line() -> None:
    line = Region.scribble([(0.05, 0.45), (0.95, 0.45)], width=0.01)
    assert line.tokens(8, 8).view(8, 8)[3].all() and line.tokens(8, 8).sum() == 8


def test_the_threshold() -> None:
    region = Region.box(0.0, 0.0, 0.375, 1.0)  # on 1 x 4: 1, 0.5, 0, 0
    assert region.tokens(1, 4, threshold=0.5).sum() == 2
    assert region.tokens(1, 4, threshold=0.6).sum() == 1
    assert Region.box(0.0, 0.0, 0.3, 1.0).tokens(1, 10, threshold=1.0).sum() == 3  # 0.3 * 10 < 3


def test_set_operations() -> None:
    a, b = Region.point(0.4, 0.5, 0.2), Region.polygon(STAR)
    assert area(a | ~a, (6, 9)) == 1
    grid = (16, 12)
    union, both = (a | b).coverage(*grid), (a & b).coverage(*grid)
    torch.testing.assert_close(union + both, (a & a).coverage(*grid) + (b | b).coverage(*grid))
    torch.testing.assert_close(1 - both, (~a | ~b).coverage(*grid))
    left, right = Region.box(0, 0, 0.5, 1), Region.box(0.5, 0, 1, 1)
    assert area(left | right, (5, 7)) == 1
    with pytest.raises(InputError, match="region 'seam': an empty combination"):
        (left & right).named("seam").tokens(5, 7)


def test_bit_sets() -> None:
    regions = [Region.box(0, 0, 0.5, 1), Region.box(0.25, 0, 0.75, 1)]
    bits = bit_sets(regions, 2, 4)
    assert bits.dtype == torch.int64
    assert bits.tolist() == [1, 3, 2, BACKGROUND] * 2
    assert bit_sets(regions, 2, 4, background=False).tolist() == [1, 3, 2, 0] * 2


def test_all_64_bits() -> None:
    """Region r on token r: each bit is its own, the sign bit works, one more is refused."""
    cells = [Region.box(r / 64, 0, (r + 1) / 64, 1) for r in range(64)]
    bits = bit_sets(cells, 1, 64, background=False)
    assert bits.tolist() == [bit(r) for r in range(64)]
    share = (bits[:, None] & bits[None, :]) != 0
    assert torch.equal(share, torch.eye(64, dtype=torch.bool))
    assert bit_sets(cells[:63], 1, 64)[63] == BACKGROUND == bit(63) == torch.iinfo(torch.int64).min
    with pytest.raises(InputError, match="regions: 64 given; 1 to 63 expected"):
        bit_sets(cells, 1, 64)
    with pytest.raises(InputError, match="regions: 65 given; 1 to 64 expected"):
        bit_sets([*cells, Region.full()], 1, 64, background=False)


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("full", Region.full()),
        ("box:0.1,0.2,0.5,0.6", Region.box(0.1, 0.2, 0.5, 0.6)),
        ("sky = box: 0,0,1,.5", Region.box(0, 0, 1, 0.5, name="sky")),
        ("point:0.3,0.4", Region.point(0.3, 0.4)),
        ("point:0.3,0.4,0.1", Region.point(0.3, 0.4, 0.1)),
        ("scribble:0,0;.5,.5;1,0", Region.scribble([(0, 0), (0.5, 0.5), (1, 0)])),
        ("scribble:0,0;.5,.5@0.2", Region.scribble([(0, 0), (0.5, 0.5)], 0.2)),
        ("polygon:0,0;1,0;1,1", Region.polygon([(0, 0), (1, 0), (1, 1)])),
    ],
)
def test_parse(text: str, region: Region) -> None:
    assert parse_region(text) == region


def test_parse_a_mask(tmp_path) -> None:
    path = tmp_path / "a=b.png"
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(path)
    region = parse_region(f"right=mask:{path}")
    assert region.name == "right" and region.coverage(1, 2).tolist() == [[0, 1]]
    with pytest.raises(InputError, match="a readable image expected"):
        parse_region(f"mask:{tmp_path / 'none.png'}")


def test_parse_a_mask_that_is_written_out() -> None:
    file = BytesIO()
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1").save(file, "PNG")
    text = "mask:data:image/png;base64," + b64encode(file.getvalue()).decode()
    region = parse_region(f"right={text}")
    assert region.name == "right" and region.coverage(1, 2).tolist() == [[0, 1]]
    for broken, message in (
        (text[:-3], "expected, in base64"),
        (text + "é", "expected, in base64"),
        ("mask:data:image/gif;base64,AAAA", "expected, in base64"),
        ("mask:data:image/png;base64,AAAA", "a readable image expected"),
    ):
        with pytest.raises(InputError, match=message):
            parse_region(broken)


@pytest.mark.parametrize(
    "text", ["", "box", "box:1,2", "box:a,b,c,d", "oval:0,0,1,1", "point:", "full:1", "mask:",
             "scribble:0,0;1,1@wide", "box:0,0,1,1;0,0,1,1", "point:0.1,0.2@0.3"]
)  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InputError, match="region: .* given; expected full, box:"):
        parse_region(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Region.box(0.5, 0, 0.5, 1), "x0 < x1 and y0 < y1 expected"),
        (lambda: Region.box(0, 0.6, 1, 0.5), "x0 < x1 and y0 < y1 expected"),
        (lambda: Region.box(0, 0, 512, 1), "box x1: 512 given; a fraction"),
        (lambda: Region.box(0, float("nan"), 1, 1), "box y0: nan given"),
        (lambda: Region.box("left", 0, 1, 1), "box x0: 'left' given"),
        (lambda: Region.point(-0.1, 0.5), "point point 0 x: -0.1 given"),
        (lambda: Region.point(0.1, 0.5, 0), "point radius: 0 given; a number above 0"),
        (lambda: Region.scribble([(0.1, 0.5)]), "scribble: 1 points given; 2 or more"),
        (lambda: Region.scribble([(0, 0), (1, 1)], float("inf")), "scribble width: inf"),
        (lambda: Region.polygon([(0, 0), (1, 1)]), "polygon: 2 points given; 3 or more"),
        (lambda: Region.polygon([(0, 0), (0.5, 0.5), (1, 1)]), "encloses no area"),
        (lambda: Region.polygon([(0, 0), (0.5, 0.5), (1, 1, 1)]), r"a pair \(x, y\) expected"),
        (lambda: Region.mask(torch.ones(1, 2, 2)), r"mask: shape \[1, 2, 2\] given"),
        (lambda: Region.mask(torch.ones(0, 2)), r"mask: shape \[0, 2\] given"),
        (lambda: Region.mask(torch.zeros(2, 2)), "mask: empty"),
        (lambda: Region.mask(torch.full((2, 2), 7.0)), "values from 7.0 to 7.0 given"),
        (lambda: Region.mask(np.array([[np.nan, 1.0]])), "0 to 1 expected"),
        (lambda: Region.mask(np.array([["a"]])), "bool, int or float expected"),
        (lambda: Region.full().coverage(0, 4), "height: 0 given"),
        (lambda: Region.full().tokens(4, 4, threshold=0), "threshold: 0 given"),
        (lambda: bit_sets([], 4, 4), "regions: 0 given"),
        (lambda: bit_sets([Region.full()], -1, 4), "height: -1 given"),
        (lambda: bit_sets(["box"], 4, 4), r"regions\[0\]: str given"),
        (lambda: bit(64), "index: 64 given"),
    ],
)  # fmt: skip
def test_bad_input(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_rounding_is_forgiven() -> None:
    assert Region.box(0, 0, 0.1 * 3 + 0.7, 1) == Region.full()
