"""Recipes on pipelines that see reference images: they act on what is drawn, references beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import References, control, recipes
from hookctl.attention.call import AttentionCall
from tests.hookctl.loop.families import BY_NAME
from tests.zoo.edits import EDITS

PROMPTS = ["a red cat", "a blue cat"]
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
WORDS = [name for name, model in EDITS.items() if model.several]

# What makes each act on both prompts.
OF_WORDS: dict[str, Callable[[], Any]] = {
    "replace": lambda: recipes.PromptToPrompt(PROMPTS, self_replace=0.5, self_resolution=1.0),
    "reweight": lambda: recipes.PromptToPrompt(PROMPTS, reweight={"blue": 3.0}),
    "blend": lambda: recipes.PromptToPrompt(PROMPTS, blend=("cat", "cat"), blend_start=0.0),
    "masactrl words": lambda: recipes.MasaCtrl(PROMPTS, start=0.0, words="cat"),
}
OF_PLACES: dict[str, Callable[[], Any]] = {
    "masactrl": lambda: recipes.MasaCtrl(PROMPTS, start=0.0),
    "masactrl masks": lambda: recipes.MasaCtrl(
        PROMPTS, start=0.0, source_mask=LEFT, target_mask=RIGHT
    ),
    "masked": lambda: recipes.MaskedSelfAttention([LEFT, RIGHT]),
}


def drawn(name: str, *editors: Any) -> Tensor:
    model = EDITS[name]
    pipe = model.make()
    with control(pipe, *editors):
        return model.draw(pipe, PROMPTS if model.several else PROMPTS[:1])


@pytest.mark.skipif("klein" not in EDITS, reason="of newer diffusers")
def test_a_pipeline_that_takes_an_image_first() -> None:
    """The whole job of a recipe gives it the prompts by name."""
    pipe = EDITS["klein"].make()
    given = BY_NAME["flux2_klein"].arguments() | {"num_inference_steps": 1}
    found = recipes.PromptToPrompt(PROMPTS).run(pipe, output_type="latent", **given)
    assert len(found) == 2


class Watch(hookctl.Editor):
    """What is left of the references' own attention: their outputs at the first site."""

    sites = "joint"

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attention(self, call: AttentionCall) -> None:
        self.calls.append(call)


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("edit", OF_WORDS)
def test_recipes_of_words(name: str, edit: str) -> None:
    plain, found = drawn(name), drawn(name, OF_WORDS[edit]())
    close = 1e-5 * plain.abs().max()
    assert (found[0] - plain[0]).abs().max() < close  # the source stays
    assert (found[1] - plain[1]).abs().max() > close


@pytest.mark.parametrize("name", [name for name, model in EDITS.items() if model.several])
@pytest.mark.parametrize("edit", OF_PLACES)
def test_recipes_of_places(name: str, edit: str) -> None:
    plain, found = drawn(name), drawn(name, OF_PLACES[edit]())
    close = 1e-5 * plain.abs().max()
    assert (found[1] - plain[1]).abs().max() > close
    if "masactrl" in edit:
        assert (found[0] - plain[0]).abs().max() < close


@pytest.mark.slow
def test_one_prompt_at_a_time() -> None:
    """All that Qwen-Image-Edit-Plus takes."""
    plain = drawn("qwen_edit")
    for edit in (
        recipes.MaskedSelfAttention([LEFT, RIGHT]),
        recipes.RegionalPrompts(["a blue dog"], [LEFT]),
    ):
        assert (drawn("qwen_edit", edit) - plain).abs().max() > 1e-5


@pytest.mark.parametrize("name", WORDS)
def test_they_stack_with_references(name: str) -> None:
    """A weight of a reference is seen beside each of them, and they beside it."""
    weight = References({0: 0.05})
    alone = drawn(name, weight)
    for edit in (OF_WORDS["replace"], OF_PLACES["masactrl"], OF_PLACES["masked"]):
        both = drawn(name, edit(), weight)
        for other in (alone, drawn(name, edit())):
            assert (both - other).abs().max() > 1e-5


def test_a_reference_is_beside_the_text_of_a_region() -> None:
    """A region that is everywhere, of the prompt's own text, is a run without it; and what is said
    of references holds inside regions."""
    model = EDITS["kontext"]
    pipe = model.make()
    texts = [PROMPTS[0]]
    regions = recipes.RegionalPrompts(texts, [(0, 0, 1, 1)], base=0.0)
    for further in ((), (References({0: 0.05}),), (References(regions={0: LEFT}),)):
        with control(pipe, *further):
            wanted = model.draw(pipe, texts)
        with control(pipe, regions, *further):
            found = model.draw(pipe, texts)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_source_map_replaces_that_over_the_target_alone() -> None:
    """Of MasaCtrl an edit has the source's image keys, and references as they were."""
    model = EDITS["kontext"]
    pipe, watch = model.make(), Watch()
    with control(pipe, recipes.MasaCtrl(PROMPTS, start=0.0), watch):
        model.draw(pipe, PROMPTS)
    call = watch.calls[0]
    (term,) = call.fold().terms[1]
    k, (start, stop) = term.own.k.tensor, call.spans.image_keys or (0, 0)
    assert torch.equal(k[..., start:stop, :], call.k[0][..., start:stop, :])
    assert torch.equal(k[..., stop:, :], call.k[1][..., stop:, :])
