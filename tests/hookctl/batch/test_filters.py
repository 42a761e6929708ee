"""Measures against their definitions, bounds, and hashes of images."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hookctl.batch.filters import measures
from hookctl.batch.filters.drawn import Drawn
from hookctl.batch.filters.perceptual import BITS, duplicates, pair_hash
from hookctl.batch.filters.specs import FilterSpec, Unmeasured, judged, measure_of, read_filters
from hookctl.demos.shapes import render
from hookctl.demos.shapes.world import sample_scene
from hookctl.errors import InputError

SIDE = 32


def drawn(edit: tuple[slice, slice], colour: int, *words: tuple[slice, slice]) -> Drawn:
    """Two grey images that differ in a part, and maps that lie where `words` say."""
    source = np.full((SIDE, SIDE, 3), 100, np.uint8)
    edited = source.copy()
    edited[edit] = colour
    maps = []
    for number, place in enumerate(words):
        map = np.full((SIDE, SIDE), 0.01, np.float32)
        map[place] = 0.2
        maps.append({f"word{number}": map})
    pair = (maps[0], maps[-1]) if maps else ({}, {})
    return Drawn(("a", "b"), (Image.fromarray(source), Image.fromarray(edited)), pair)


LEFT, TOP = np.s_[:, :16], np.s_[:16, :]


def test_background_is_the_psnr_outside() -> None:
    inside = drawn(LEFT, 150, LEFT)
    assert measures.background(inside) == measures.EQUAL
    everywhere = drawn(np.s_[:, :], 150, LEFT)
    wanted = 10 * np.log10(255**2 / 50**2)
    assert measures.background(everywhere) == pytest.approx(wanted)
    assert measures.change(everywhere) == pytest.approx(50 / 255)
    assert measures.change(drawn(np.s_[:, 16:], 150, LEFT)) == 0  # nothing where it is looked for
    assert measures.change(drawn(LEFT, 150)) == pytest.approx(25 / 255)


def test_overlap_is_of_both_masks() -> None:
    assert measures.overlap(drawn(LEFT, 0, LEFT, LEFT)) == 1
    assert measures.overlap(drawn(LEFT, 0, LEFT, TOP)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("measure", [measures.background, measures.overlap])
def test_without_maps_there_is_nothing_to_measure(measure: object) -> None:
    with pytest.raises(Unmeasured, match="no map of a word"):
        measure(drawn(LEFT, 0))  # type: ignore[operator]
    with pytest.raises(Unmeasured, match="the words are everywhere"):
        measures.background(drawn(LEFT, 0, np.s_[:, :]))


def test_the_first_that_fails_says_why() -> None:
    tables = [
        {"measure": "overlap"},
        {"measure": "background", "min": 20.0},
        {"measure": "change", "max": 0.1},
    ]
    filters = [(spec, measure_of(spec, {})) for spec in read_filters(tables, "job.toml")]
    scores, fault = judged(drawn(np.s_[:, :], 150, LEFT), filters)
    assert fault == "background < 20" and list(scores) == ["overlap", "background"]
    scores, fault = judged(drawn(LEFT, 250, LEFT), filters)
    assert fault == "change > 0.1" and len(scores) == 3
    assert judged(drawn(LEFT, 110, LEFT), filters)[1] is None
    assert judged(drawn(LEFT, 110), filters)[1] == "overlap: no map of a word in both prompts"


def test_yes_and_no_and_nan() -> None:
    spec = FilterSpec("mine", 1.0)
    assert spec.fault(False) == "mine: no" and spec.fault(True) is None
    assert spec.fault(float("nan")) == "mine < 1"
    scores, fault = judged(drawn(LEFT, 0), [(FilterSpec("mine"), lambda _: np.bool_(False))])
    assert scores == {"mine": 0.0} and fault == "mine: no"


def test_a_function_of_a_package() -> None:
    spec = FilterSpec("numpy:no_such_function", where="here")
    with pytest.raises(InputError, match="numpy has no function no_such_function"):
        measure_of(spec, {})
    with pytest.raises(InputError, match="no installed package holds 'nowhere'"):
        measure_of(FilterSpec("nowhere:f", where="here"), {})
    with pytest.raises(InputError, match="is no function; write package.module:function"):
        measure_of(FilterSpec("a b:f", where="here"), {})
    assert measure_of(FilterSpec("numpy:mean"), {}) is np.mean


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return render.drawn([sample_scene(draw) for _ in range(count)])


def test_hashes_see_what_eyes_see() -> None:
    images = pictures(40)
    hashes = [pair_hash(one, one) for one in images]
    assert all(len(one) == BITS // 4 for one in hashes)
    assert duplicates(hashes, 4) == {}  # other scenes
    pixels = np.asarray(images[0], int)
    noisy = Image.fromarray((pixels + 1).clip(0, 255).astype(np.uint8))
    assert duplicates([*hashes, pair_hash(noisy, noisy)], 4) == {40: 0}
    swapped = Image.fromarray(np.asarray(images[0])[..., ::-1].copy())  # red for blue
    assert duplicates([hashes[0], pair_hash(swapped, swapped)], 4) == {}


@pytest.mark.parametrize("near", [0, 1, 4])
def test_duplicates_are_those_of_all_comparisons(near: int) -> None:
    draw = random.Random(near)
    numbers = [draw.getrandbits(BITS) for _ in range(30)]
    for number in numbers[:20]:
        for flips in range(6):
            numbers.append(number ^ sum(1 << bit for bit in draw.sample(range(BITS), flips)))
    draw.shuffle(numbers)
    kept: list[int] = []
    wanted = {}
    for i, number in enumerate(numbers):
        first = next((k for k in kept if (numbers[k] ^ number).bit_count() <= near), None)
        if first is None:
            kept.append(i)
        else:
            wanted[i] = first
    assert duplicates([f"{number:096x}" for number in numbers], near) == wanted
    assert wanted


def test_folders_of_clip_are_looked_for(tmp_path: Path) -> None:
    table = {"measure": "clip_text", "model": "clip"}
    with pytest.raises(FileNotFoundError, match="there is no such folder of a model"):
        read_filters([table], str(tmp_path / "job.toml"))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    (spec,) = read_filters([table], str(tmp_path / "job.toml"))
    assert spec.options == {"model": str(tmp_path / "clip")}
