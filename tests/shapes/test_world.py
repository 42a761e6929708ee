"""The world: sentences, the split, and the renderer against exact masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hookctl.demos.shapes.captions import is_held_out, parse, relation, sample
from hookctl.demos.shapes.render import render
from hookctl.demos.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    LATTICE,
    SHAPES,
    SPACING,
    Thing,
    sample_scene,
)


def test_captions_say_what_is_there() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene, text = sample(rng)
        request = parse(text)
        said = sorted((m.shape, m.colour, m.pattern, m.size) for m in request.mentions)
        true = sorted((t.shape, t.colour, t.pattern, t.size) for t in scene.things)
        assert said == true, text
        assert request.background in (None, scene.background)
        by_name = {(t.shape, t.colour): t for t in scene.things}
        things = [by_name[m.shape, m.colour] for m in request.mentions]
        for k, said_relation in enumerate(request.relations):
            if said_relation is not None:
                assert relation(things[k - 1], things[k]) == said_relation, text


def test_split_ignores_the_background_and_is_a_tenth() -> None:
    rng = np.random.default_rng(1)
    texts = {sample(rng, held_out=bool(k % 2))[1] for k in range(400)}
    body = {text.split(" on a ")[0] for text in texts}
    assert {is_held_out(b) for b in body} == {True, False}
    for b in body:
        assert is_held_out(b) == is_held_out(f"{b} on a black background")
    everything = [f"a {c} {s} and a {d} {z}" for c in COLOURS for s in SHAPES for d in COLOURS
                  for z in SHAPES]  # fmt: skip
    assert 0.05 < np.mean([is_held_out(t) for t in everything]) < 0.15


def test_scenes_keep_apart_and_on_the_lattice() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        scene = sample_scene(rng)
        assert len({(t.shape, t.colour) for t in scene.things}) == len(scene.things)
        covered = sum(t.mask().astype(int) for t in scene.things)
        assert covered.max() == 1
        for t in scene.things:
            assert t.centre[0] % SPACING == t.centre[1] % SPACING == 0
            x0, y0, x1, y1 = t.box
            ys, xs = np.nonzero(t.mask())
            assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert 0 < x0 and 0 < y0 and x1 < IMAGE_SIZE and y1 < IMAGE_SIZE


@pytest.mark.parametrize("lattice", [1, LATTICE])
def test_rendering_equals_the_masks(lattice: int) -> None:
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, lattice=lattice) for _ in range(60)]
    images = render(scenes)
    assert images.shape == (60, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.float32
    assert images.min() >= -1.0001 and images.max() <= 1.0001
    for scene, image in zip(scenes, images, strict=True):
        pixels = (image.permute(1, 2, 0).numpy() + 1) * 127.5
        free = ~np.any([t.mask() for t in scene.things], axis=0)
        background = np.array(BACKGROUNDS[scene.background])
        assert np.mean(np.abs(pixels[free] - background).max(1) < 0.1) > 0.98
        for thing in scene.things:
            if thing.pattern == "plain":
                inside = np.abs(pixels[thing.mask()] - COLOURS[thing.colour]).max(1) < 0.1
                assert inside.mean() > 0.7


def test_stripes_lie_on_the_lattice_of_the_image() -> None:
    thing = Thing("square", "red", "striped", "large", (64, 60))
    from hookctl.demos.shapes.world import Scene

    column = render([Scene((thing,))])[0, 0, 42:78, 64]
    bright = (torch.arange(42, 78) // 4 % 2) == 0
    assert bool((column[bright] > 0.7).all()) and bool((column[~bright] < 0.0).all())
