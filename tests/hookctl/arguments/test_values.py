"""Checks of arguments: what passes, and that a message says the argument, its value and a cure."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hookctl import arguments
from hookctl.errors import InputError

NUMBERS: list[tuple[Any, dict[str, Any], str]] = [
    (-1, {"low": 0}, "X: a=-1; give a finite number of 0 or more"),
    (math.nan, {"low": 0}, "X: a=nan; give a finite number of 0 or more"),
    (True, {}, "X: a=True; give a finite number"),
    ("3", {}, "X: a='3'; give a finite number"),
    (math.inf, {"low": 0}, "X: a=inf; give a finite number of 0 or more"),
    (-1, {"low": 0, "also": (math.inf,)}, "X: a=-1; give a finite number of 0 or more or inf"),
    (0, {"above": 0}, "X: a=0; give a finite number above 0"),
    (0, {"above": 0, "high": 1}, "X: a=0; give a number above 0, at most 1"),
    (1, {"low": 0, "below": 1}, "X: a=1; give a number from 0 to below 1"),
    (2, {"low": 0, "high": 1}, "X: a=2; give a number from 0 to 1"),
    (2, {"low": 3, "wanted": "three"}, "X: a=2; give three"),
    (torch.ones(2, 3), {}, "X: a=a tensor (2, 3); give a finite number"),
]


@pytest.mark.parametrize(("value", "bounds", "message"), NUMBERS)
def test_refused_numbers(value: Any, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        arguments.number(value, "X: a", **bounds)
    assert str(refused.value) == message


def test_numbers_that_pass() -> None:
    assert arguments.number(np.float32(0.5), "a", low=0, high=1) == 0.5
    assert arguments.number(math.inf, "a", low=0, also=(math.inf,)) == math.inf
    assert type(arguments.number(3, "a")) is float
    assert arguments.share(1, "a") == 1.0
    assert type(arguments.whole(np.int64(3), "a")) is int
    for wrong in (-1, 1.0, True, "1"):
        with pytest.raises(InputError, match="; give a whole number of 0 or more"):
            arguments.whole(wrong, "a")


def test_one_or_several() -> None:
    two = partial(arguments.pair, one=partial(arguments.whole, least=1), wanted="one, or two")
    assert two(3, "a") == (3, 3) and two([1, 2], "a") == (1, 2)
    for wrong in (0, (1, 2, 3), (1, "2"), ()):
        with pytest.raises(InputError, match="give one, or two"):
            two(wrong, "a")
    with pytest.raises(InputError, match="a='z'; give one of x, y"):
        arguments.one_of("z", "a", ("x", "y"))
    with pytest.raises(InputError, match="has 1 entries for 2 edits"):
        arguments.for_each(["x"], "a", 2, "edits", is_one=False)


def test_words_and_gains() -> None:
    assert arguments.words_for_each("x", "a", 2) == [("x",), ("x",)]
    assert arguments.words_for_each(["x", None, ("y", "z")], "a", 3) == [("x",), (), ("y", "z")]
    assert arguments.gains_for_each({"x": 2}, "a", 2) == [{"x": 2.0}, {"x": 2.0}]
    assert arguments.gains_for_each([None, {"x": -1.0}], "a", 2) == [{}, {"x": -1.0}]
    assert arguments.gains_for_each(None, "a", 1) == [{}]


def test_images(tmp_path: Any) -> None:
    image = Image.new("RGB", (8, 8))
    assert arguments.images_and_prompts(image, "prompt", "X") == ([image], ["prompt"])
    with pytest.raises(InputError, match="prompt=an image of 8 x 8 px; give the image before its"):
        arguments.images_and_prompts("prompt", image, "X")
    for images, prompts in (([image], ["a", "b"]), ([], [])):
        with pytest.raises(InputError, match="images and .* prompts; give as many of both"):
            arguments.images_and_prompts(images, prompts, "X")
    with pytest.raises(InputError, match="give a readable image"):
        arguments.opened(tmp_path / "none.png", "X: image")
    assert arguments.colours((1, 2, 3), "a") == [(1, 2, 3)]
    assert arguments.colours([(1, 2, 3), (4, 5, 6)], "a") == [(1, 2, 3), (4, 5, 6)]
    with pytest.raises(InputError, match="each from 0 to 255"):
        arguments.colours((0, 0, 256), "a")
