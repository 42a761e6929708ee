"""Embeddings in place of prompts: enough for editors that count rows, and for words with texts=."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import Editor, Maps, control
from hookctl.errors import InputError
from hookctl.recipes import PAG, LayoutGuidance, MasaCtrl, PromptToPrompt, StyleAligned
from tests import zoo

TWO = ["a red cat", "a red dog"]
SD15 = zoo.PIPELINES["sd15"]


def embeddings(pipe: Any, texts: list[str]) -> dict[str, Tensor]:
    """What `encode_prompt` makes of them, and of as many negative prompts."""
    found = pipe.encode_prompt(texts, "cpu", 1, True)
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), found, strict=True))


def drawn(pipe: Any, editor: Editor, texts: list[str] | None = None, **given: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(0) for _ in TWO]
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    with control(pipe, editor, texts=texts):
        latents: Tensor = pipe(**given, generator=generators, **options).images
    return latents


def rows_only() -> list[Editor]:
    return [StyleAligned(TWO), MasaCtrl(TWO, start=0), PAG()]


@pytest.mark.parametrize("editor", rows_only(), ids=lambda editor: editor.name)
def test_editors_that_only_count_rows(editor: Editor) -> None:
    pipe = SD15.make()
    wanted = drawn(pipe, editor, prompt=TWO)
    assert torch.equal(drawn(pipe, editor, **embeddings(pipe, TWO)), wanted)


def test_as_many_embeddings_as_prompts() -> None:
    pipe = SD15.make()
    with pytest.raises(InputError, match="made for 3 prompts, but the pipeline draws 2"):
        drawn(pipe, StyleAligned([*TWO, "a cat"]), **embeddings(pipe, TWO))


def of_words() -> list[Editor]:
    layout = LayoutGuidance(["red"], [(0, 0, 0.5, 1)], stop=1.0)
    return [PromptToPrompt(TWO), MasaCtrl(TWO, words=["cat", "dog"], start=0), Maps("red"), layout]


@pytest.mark.parametrize("editor", of_words(), ids=lambda editor: editor.name)
def test_texts_give_words_to_those_that_need_them(editor: Editor) -> None:
    pipe = SD15.make()
    wanted = drawn(pipe, editor, prompt=TWO)
    given = embeddings(pipe, TWO)
    assert torch.equal(drawn(pipe, editor, TWO, **given), wanted)
    with pytest.raises(InputError, match="embeddings.*texts="):
        drawn(pipe, editor, **given)


def test_texts_that_can_not_be_those_of_the_embeddings() -> None:
    pipe = SD15.make()
    with pytest.raises(InputError, match="for 2 embeddings; give one for each"):
        drawn(pipe, Maps("cat"), ["a cat"], **embeddings(pipe, TWO))
    with pytest.raises(InputError, match="was called with the prompts .*leave texts out"):
        drawn(pipe, Maps("cat"), ["a cat", "a dog"], prompt=TWO)
    with pytest.raises(InputError, match="control: texts"):
        control(pipe.unet, texts=TWO)
    with pytest.raises(InputError, match="control: texts='a cat'; give a list of texts or None"):
        control(pipe, texts="a cat")  # type: ignore[arg-type]
