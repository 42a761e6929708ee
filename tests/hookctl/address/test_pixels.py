"""Masks and pictures of every mode: without loss, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hookctl.address.pixels import mask_values, readable, rgb
from hookctl.address.regions import Region, parse_region
from hookctl.errors import InputError

STEPS = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)  # fifths of white
GREY = Image.fromarray(STEPS)
SIXTEEN = Image.fromarray(STEPS.astype(np.uint16) * 257 - np.uint16(100) * (STEPS == 51))
BIG_ENDIAN = Image.frombytes("I;16B", (3, 2), np.asarray(SIXTEEN).astype(">u2").tobytes())
WHITE = Image.new("L", (3, 2), 255)
COLOURED = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 3, 3), dtype=np.uint8))
HALVES = Image.fromarray(np.array([[0, 0, 255]] * 2, dtype=np.uint8))


def with_alpha(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(alpha)
    return picture


def palette_with_transparency() -> Image.Image:
    picture = Image.fromarray(np.array([[0, 0, 1]] * 2, dtype=np.uint8))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.info["transparency"] = 0
    return picture


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "RGBX", "LA", "CMYK", "YCbCr", "HSV", "P"])
def test_grey_masks_keep_their_values(mode: str) -> None:
    picture = GREY.convert(mode)
    assert np.array_equal(mask_values(picture), STEPS / 255)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (HALVES.convert("1"), np.asarray(HALVES) / 255),
        (SIXTEEN, np.asarray(SIXTEEN) / 65535),
        (BIG_ENDIAN, np.asarray(SIXTEEN) / 65535),
        (Image.fromarray((STEPS / 255).astype(np.float32)), (STEPS / 255).astype(np.float32)),
        (with_alpha(WHITE, GREY), STEPS / 255),
        (with_alpha(WHITE.convert("RGB"), GREY), STEPS / 255),
        (with_alpha(WHITE.convert("RGB"), GREY).convert("RGBa"), STEPS / 255),
        (with_alpha(WHITE, GREY).convert("La"), STEPS / 255),
        (with_alpha(COLOURED, GREY), STEPS / 255),
        (palette_with_transparency(), np.array([[0, 0, 1]] * 2)),
    ],
)
def test_other_depths_and_alpha_channels(picture: Image.Image, expected: np.ndarray) -> None:
    assert np.array_equal(mask_values(picture), expected)


def test_a_16_bit_file(tmp_path: Path) -> None:
    SIXTEEN.save(tmp_path / "mask.png")
    region = parse_region(f"mask:{tmp_path / 'mask.png'}")
    assert np.allclose(region.coverage(2, 3), np.asarray(SIXTEEN) / 65535, atol=1e-7)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (COLOURED, "a coloured picture .*getchannel"),
        (COLOURED.convert("CMYK"), "a coloured picture .*'CMYK'"),
        (with_alpha(GREY, HALVES), "a grey mask and transparent as well"),
        (Image.new("I", (3, 2), 7), "mode 'I' given"),
        (Image.new("LAB", (3, 2)), "mode 'LAB' given"),
        (Image.new("F", (3, 2), 7.0), "values from 7.0 to 7.0 given"),
        (with_alpha(WHITE, Image.new("L", (3, 2), 0)), "empty"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64 values given"),
    ],
)
def test_masks_that_could_mean_several_things(picture: Image.Image, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Region.mask(picture)


def test_a_mask_of_several_frames(tmp_path: Path) -> None:
    GREY.save(tmp_path / "a.tiff", save_all=True, append_images=[HALVES])
    with Image.open(tmp_path / "a.tiff") as picture, pytest.raises(InputError, match="2 frames"):
        mask_values(picture)


def test_nearly_grey_pictures_are_grey() -> None:
    values = np.stack([STEPS] * 3, -1).astype(int)
    values[0, 1] += (2, -3, 1)
    got = mask_values(Image.fromarray(values.astype(np.uint8)))
    assert np.abs(got - STEPS / 255).max() < 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SIXTEEN, "more than 8 bits"),
        (lambda: with_alpha(COLOURED, GREY), "transparent parts"),
        (lambda: palette_with_transparency(), "transparent parts"),
        (lambda: Image.new("F", (3, 2)), "more than 8 bits"),
    ],
)
def test_pictures_that_would_lose(make: Callable[[], Image.Image], message: str) -> None:
    with pytest.raises(InputError, match=f"image: .*{message}"):
        rgb(make(), "image")


def test_pictures_in_files(tmp_path: Path) -> None:
    with_alpha(COLOURED, WHITE).save(tmp_path / "opaque.png")
    assert np.array_equal(np.asarray(readable(tmp_path / "opaque.png", "image")), COLOURED)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    for name in ("broken.png", "none.png"):
        with pytest.raises(InputError, match=f"image='.*{name}'.*give a readable image"):
            readable(tmp_path / name, "image")
