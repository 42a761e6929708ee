"""Maps as a person sees them: scales, bars, outlines, and sheets that fit on a page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import hookctl
from hookctl.errors import InputError
from hookctl.inspect import show
from tests.hookctl.inspect.test_show import plain

SPOT = torch.zeros(16, 16)
SPOT[3:6, 9:13] = 1.0


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=float)


def test_one_scale_for_several_maps() -> None:
    """It starts at 0: what is even and weak does not look like a result."""
    noise = 0.2 + 0.01 * torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    assert show.scale_of([noise, SPOT]) == (0.0, 1.0)
    assert show.scale_of([SPOT - 2]) == (-2.0, -1.0)
    scale = show.scale_of([noise, SPOT])
    alone, beside = pixels(show.heatmap(noise)), pixels(show.heatmap(noise, scale=scale))
    assert beside.std((0, 1)).max() < 5 < alone.std((0, 1)).max()
    with pytest.raises(InputError, match="maps: none given"):
        show.scale_of([])


@pytest.mark.parametrize("colour", ["white", "black", "gray", "red", "yellow", "#fcffa4"])
def test_an_overlay_is_read_on_any_ground(colour: str) -> None:
    """The spot, and a line round it, stand out; where the map is 0 the image is seen."""
    image = pixels(show.overlay(plain(colour, (256, 256)), SPOT))
    inside, outside = image[72, 176], image[200, 40]
    assert np.abs(inside - outside).max() > 60
    row = image[72, 130:160]  # from outside to inside
    assert (row.max(-1) == 0).any() and (row.min(-1) == 255).any()
    low = pixels(show.overlay(plain(colour, (256, 256)), SPOT * 0))
    assert np.abs(low - low[0, 0]).max() == 0  # nothing to see, no line


def test_images_differ_where_the_map_is_low() -> None:
    white, black = (pixels(show.overlay(plain(c, (256, 256)), SPOT)) for c in ("white", "black"))
    assert (white - black)[200, 40].min() > 90


def test_regions_are_outlined() -> None:
    box = hookctl.Region.box(0.25, 0.25, 0.75, 0.75, name="circle")
    image = pixels(show.outlined(plain("white", (256, 256)), [box]))
    assert (image[128, 60:68] == show.OF_REGIONS).all(-1).any()
    assert (image[128, 100] == 255).all() and (image[20, 20] == 255).all()
    assert (image[66:90, 70:100] < 120).any()  # its name
    whole = pixels(show.outlined(plain("white", (256, 256)), [hookctl.Region.full()]))
    assert (whole[0, 0] != 255).any()
    over = show.overlay(plain("white"), SPOT, regions=[box])
    assert over.tobytes() != show.overlay(plain("white"), SPOT).tobytes()


def test_a_bar_at_the_end_of_a_row() -> None:
    rows = [[plain("red"), plain("red")]] * 2
    bare, barred = show.grid(rows), show.grid(rows, scales=[(0.0, 0.42), None])
    assert barred.height == bare.height and 20 < barred.width - bare.width < 120
    assert barred.crop((0, 0, bare.width, bare.height)).tobytes() == bare.tobytes()
    bar = pixels(barred)[8:264, bare.width + 2]
    grey = bar.mean(-1)
    assert (np.diff(grey[2:-2]) <= 1).all() and grey[5] > 180 > 40 > grey[-5]
    assert (pixels(barred)[280:, bare.width :] == 255).all()  # the other row has none
    with pytest.raises(InputError, match="scales: 1 given; 2 expected"):
        show.grid(rows, scales=[None])


@pytest.mark.parametrize("columns", [6, 7, 12, 25])
def test_wide_grids_break(columns: int) -> None:
    titles = [f"word {i}" for i in range(columns)]
    sheet = show.grid([[plain("red")] * columns], titles, ["a prompt"], scales=[(0.0, 1.0)])
    assert sheet.width <= 1600
    red = (pixels(sheet) == (255, 0, 0)).all(-1).sum() / 256**2
    assert red == columns
    assert show.grid([[plain("red")] * columns], widest=None).width == 264 * columns + 8


def test_only_pieces_with_maps_have_a_bar() -> None:
    row = [plain("red")] * 8
    some = show.grid([row], scales=[(0.0, 1.0)], scaled_from=5)
    every = show.grid([row], scales=[(0.0, 1.0)])
    beside = pixels(some)[8:264, 4 * 264 + 8 :], pixels(every)[8:264, 4 * 264 + 8 :]
    assert (beside[0] == 255).all() and (beside[1] != 255).any()
    below = (slice(280, None), slice(None))
    assert (pixels(some)[below] == pixels(every)[below]).all()


def test_large_images_stay_beside_one_another() -> None:
    sheet = show.grid([[plain("red", (1024, 1024))] * 3])
    assert 1400 < sheet.width <= 1600 and sheet.height < 600
    assert show.grid([[plain("red", (1024, 1024))]]).size == (1040, 1040)


def test_a_sheet_of_words() -> None:
    """Rows of words, each on one scale."""
    maps = {f"word{i}": SPOT * (i + 1) for i in range(8)}
    sheet, scales = show.map_sheet(plain("white", (256, 256)), maps)
    assert sheet.width <= 1600 and sheet.height > 2 * 256
    assert list(scales) == list(maps)
    assert scales["word0"] == scales["word3"] != scales["word7"] == (0.0, 8.0)


def test_strips_have_a_bar_if_asked() -> None:
    maps = [SPOT * k for k in (0.5, 1.0)]
    bare, barred = (show.time_strip(maps, ["0", "1"], bar=bar) for bar in (False, True))
    assert barred.width > bare.width and barred.height == bare.height
