"""Negative words of pipelines that encode the negative prompt by a call of its own."""

from __future__ import annotations

import pytest

import hookctl
from hookctl import Maps
from hookctl.errors import InputError, UnsupportedError, WordError
from tests import zoo


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_words_of_a_second_call_of_the_encoder(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    with hookctl.control(pipe, Maps("cat"), Maps("blurry", negative=True)) as session:
        case.run(pipe, ["a red cat", "a blue cat"], ["blurry", "a blurry dog"], guidance=4.0)
    maps = session.maps
    assert maps.words == ("cat",)
    assert maps.word("blurry", negative=True).prompts == (0, 1)
    with (
        hookctl.control(pipe, Maps("cat", negative=True)),
        pytest.raises(WordError, match="'cat' is not in the prompt 'blurry'"),
    ):
        case.run(pipe, ["a red cat"], ["blurry"], guidance=4.0)


def test_a_second_text_for_the_second_encoder() -> None:
    """Flux shows its attention the text of its T5, the negative one too."""
    case = zoo.PIPELINES["flux"]
    pipe = case.make()
    with hookctl.control(pipe, Maps("dull", negative=True)) as session:
        case.run(pipe, ["a red cat"], ["blurry"], guidance=4.0, negative_prompt_2="dull")
    assert session.maps.word("dull", negative=True) is not None


def test_runs_without_a_negative_prompt() -> None:
    case = zoo.PIPELINES["flux"]
    pipe = case.make()
    with (
        hookctl.control(pipe, Maps("blurry", negative=True)),
        pytest.raises((InputError, UnsupportedError), match="guidance"),
    ):
        case.run(pipe, ["a red cat"], ["blurry"], guidance=1.0)
