"""Images have the geometry and the colours that they should; tables line up; errors speak."""

import numpy as np
import pytest
import torch
from PIL import Image

from hookctl.errors import InputError
from hookctl.inspect.show import (
    contact_sheet,
    grid,
    heatmap,
    markdown_table,
    overlay,
    table,
    time_strip,
)


def plain(colour: str, size: tuple[int, int] = (128, 128)) -> Image.Image:
    return Image.new("RGB", size, colour)


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def ramp(h: int = 8, w: int = 12) -> torch.Tensor:
    return torch.linspace(0, 1, h * w).view(h, w)


def test_heatmap_colours() -> None:
    """Brightness rises with the value; each cell of the map is one flat square."""
    image = heatmap(torch.linspace(3, 5, 64)[None], (640, 10))
    grey = np.asarray(image.convert("L"), dtype=int)[5]
    assert (np.diff(grey) >= 0).all() and grey[0] < 3 and grey[-1] > 240
    assert len(np.unique(np.asarray(image)[5, :10], axis=0)) == 1
    assert heatmap(ramp()).size == (252, 168)
    assert heatmap(ramp(), (100, 40), smooth=True).size == (100, 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_heatmap_takes_any_map(dtype: torch.dtype) -> None:
    heatmap(ramp().to(dtype).requires_grad_())


def test_heatmap_normalisation() -> None:
    half = torch.full((4, 4), 0.5)
    assert pixel(heatmap(half), 0, 0) == (0, 0, 4)  # a flat map has nothing to show
    assert pixel(heatmap(half, normalise=False), 0, 0) == (186, 54, 85)
    assert (
        heatmap(half * 9, normalise=False).tobytes() == heatmap(half * 2, normalise=False).tobytes()
    )


def test_overlay() -> None:
    """Wide maps on wide images; bright where the map is; nothing at alpha 0."""
    map = torch.zeros(4, 8)
    map[1, 6] = 1
    image = overlay(plain("white", (512, 256)), map)
    assert image.size == (512, 256)
    red, _, blue = pixel(image, 6 * 64 + 32, 96)
    assert red - blue > 60  # hot
    assert max(pixel(image, 64, 192)) < 200
    photo = Image.effect_noise((300, 300), 60).convert("RGB")
    assert overlay(photo, map, alpha=0).tobytes() == photo.tobytes()
    assert overlay(plain("white"), map).size == (256, 256)
    assert overlay(photo, map, label="cat").tobytes() != overlay(photo, map).tobytes()


def test_grid_geometry() -> None:
    sheet = grid([[plain("red"), None, plain("blue")]] * 2, cell=(100, 60), pad=10)
    assert sheet.size == (3 * 110 + 10, 2 * 70 + 10)
    for y in (10 + 30, 80 + 30):
        assert pixel(sheet, 10 + 50, y) == (255, 0, 0)
        assert pixel(sheet, 120 + 50, y) == (255, 255, 255)  # the empty place
        assert pixel(sheet, 230 + 50, y) == (0, 0, 255)
    assert pixel(sheet, 10 + 10, 40) == (
        255,
        255,
        255,
    )  # a square image is centred, not stretched
    assert pixel(sheet, 10 + 21, 40) == (255, 0, 0)


def test_grid_titles() -> None:
    """Titles take room outside the images, wrap, and are drawn; a dark page has light text."""
    row = [plain("red"), plain("red")]
    bare = grid([row])
    assert bare.size == (2 * 264 + 8, 264 + 8)
    titled = grid([row], ["before", "after"], ["seed 0"])
    assert titled.width > bare.width and titled.height > bare.height
    corner = np.asarray(titled.convert("L"))[: titled.height - 272, :]
    assert corner.min() < 60
    assert titled.crop((titled.width - 536, titled.height - 272, *titled.size)).tobytes() == (
        bare.tobytes()
    )
    long = grid([row], ["before", "a title of many more words than fit into the width of a cell"])
    assert long.width == bare.width and long.height > grid([row], ["before", "after"]).height
    dark = np.asarray(grid([row], ["before", "after"], background="black").convert("L"))
    assert dark[:20].max() > 200


def test_time_strip() -> None:
    """One scale for all steps: only the strongest reaches the top of the colours."""
    maps = [ramp() * k for k in (0.25, 0.5, 1)]
    strip = np.asarray(time_strip(maps, ["0", "10", "20"], cell=(120, 80)), dtype=int)
    assert strip.shape[1] == 3 * 128 + 8
    ends = strip[-9 - 3, [8 + 118 + i * 128 for i in range(3)]].sum(-1)
    assert ends[0] < ends[1] < ends[2]
    over = time_strip(maps, ["0", "10", "20"], plain("white"))
    assert over.width == 3 * 264 + 8


def test_contact_sheet() -> None:
    images = [plain("red"), plain("lime"), plain("blue")]
    sheet = contact_sheet(images)
    assert sheet.size == (2 * 264 + 8, 2 * 264 + 8)
    assert pixel(sheet, 100, 372) == (0, 0, 255) and pixel(sheet, 372, 372) == (255, 255, 255)
    assert contact_sheet(images, ["a", "b", "c"], columns=9).size == (3 * 264 + 8, 264 + 8)
    assert images[0].tobytes() == plain("red").tobytes()  # labels go on copies


def test_table() -> None:
    rows = [["down.0", 64, 0.123456, True], ["mid", None, 12.0, False]]
    assert table(rows, ["site", "depth", "ms", "on"]).split("\n") == [
        "site    depth      ms  on",
        "------  -----  ------  ---",
        "down.0     64  0.1235  yes",
        "mid                12  no",
    ]
    assert table([], ["site", "ms"]).split("\n") == ["site  ms", "----  --"]


def test_markdown_table() -> None:
    assert markdown_table([["a|b", 1], ["c", None]], ["name", "n"]).split("\n") == [
        "| name | n |",
        "| --- | ---: |",
        "| a\\|b | 1 |",
        "| c |  |",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heatmap(torch.ones(1, 4, 4)), r"map: shape \[1, 4, 4\] given"),
        (lambda: heatmap(np.ones((4, 4))), "map: ndarray given"),
        (lambda: heatmap(torch.full((2, 2), float("nan"))), "map: NaN"),
        (lambda: overlay(plain("red"), ramp(), alpha=2), "alpha: 2 given"),
        (lambda: grid([]), "rows: lengths"),
        (lambda: grid([[None], [None, None]]), r"rows: lengths \[1, 2\] given"),
        (lambda: grid([[None]], ["a", "b"]), "column_titles: 2 given; 1 expected"),
        (lambda: grid([[None]], None, []), "row_titles: 0 given; 1 expected"),
        (lambda: time_strip([ramp()], []), "1 maps, 0 labels"),
        (lambda: contact_sheet([]), "images: none given"),
        (lambda: contact_sheet([plain("red")], ["a", "b"]), "labels: 2 given; 1 expected"),
        (lambda: table([[1, 2]], ["a"]), r"rows\[0\]: 2 cells given; 1 expected"),
        (lambda: markdown_table([], []), "headers: none given"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
