"""The detector against ground truth, and what it must not be fooled by."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hookctl.demos.shapes.detect import detect, matches
from hookctl.demos.shapes.evaluate import reads_all
from hookctl.demos.shapes.render import drawn, render, to_uint8
from hookctl.demos.shapes.world import Scene, Thing, sample_scene


@pytest.mark.parametrize("lattice, seed", [(8, 0), (1, 1)])
@pytest.mark.slow  # many renderings
def test_reads_every_attribute_of_renderings(lattice: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, lattice=lattice) for _ in range(150)]
    found = [detect(p) for p in to_uint8(render(scenes))]
    assert np.mean([matches(d, s) for d, s in zip(found, scenes, strict=True)]) >= 0.99
    assert np.mean([reads_all(d, s) for d, s in zip(found, scenes, strict=True)]) >= 0.99
    for d, s in zip(found, scenes, strict=True):
        made = np.array([o.box for o in d.objects])
        off = [np.abs(made - np.array(t.box)).max(1).min() for t in s.things]
        assert max(off) <= 1, (d, s)


def _image(*things: Thing, background: str = "white") -> Image.Image:
    return drawn([Scene(things, background)])[0]


def test_matches_is_strict() -> None:
    red = Thing("circle", "red", centre=(40, 40))
    blue = Thing("square", "blue", centre=(88, 88))
    both = detect(_image(red, blue))
    assert matches(both, "a red circle and a blue square")
    assert matches(both, [("square", "blue"), ("circle", "red")])
    assert not matches(both, "a red circle")
    assert not matches(both, "a blue circle and a red square")
    assert not matches(detect(_image(red)), "a red circle and a blue square")
    assert both.find("circle", "red") is not None and both.find("star") is None


def test_specks_are_ignored_and_odd_blobs_are_extras() -> None:
    image = _image(Thing("circle", "red", centre=(40, 40)))
    draw = ImageDraw.Draw(image)
    draw.rectangle((100, 100, 103, 103), fill=(40, 75, 235))
    assert matches(detect(image), "a red circle")
    draw.rectangle((60, 100, 125, 104), fill=(40, 75, 235))
    read = detect(image)
    assert len(read.extras) == 1 and not matches(read, "a red circle")


def test_touching_colours_are_parted() -> None:
    image = _image()
    draw = ImageDraw.Draw(image)
    draw.rectangle((30, 40, 61, 71), fill=(222, 28, 40))
    draw.rectangle((62, 40, 93, 71), fill=(40, 75, 235))
    assert matches(detect(image), "a red square and a blue square")


def test_floats_and_bytes_read_alike() -> None:
    image = np.asarray(_image(Thing("star", "green", "striped"), background="gray"))
    assert detect(image) == detect(image / 255.0)
    with pytest.raises(ValueError, match="expected an image"):
        detect(image[..., 0])
