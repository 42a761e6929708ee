"""Wrong input to Prompt-to-Prompt is refused before anything is drawn, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from hookctl import control
from hookctl.errors import (
    AlignmentError,
    ConflictError,
    HookctlError,
    HookctlWarning,
    InputError,
    UnsupportedError,
    WordError,
)
from hookctl.recipes import PromptToPrompt
from tests import zoo
from tests.recipes.runs import made

CAT = "a red cat above a blue square"
DOG = "a red dog above a blue square"
SHORT = "a dog"


@cache
def before(family: str) -> torch.Tensor:
    return zoo.PIPELINES[family].run(made(family), [CAT, DOG])


@contextmanager
def refused(family: str, error: type[HookctlError], match: str) -> Iterator[None]:
    """The block raises, the denoiser is never run, and the pipeline is as it was."""
    case, pipe = zoo.PIPELINES[family], made(family)
    plain = before(family)
    calls: list[int] = []
    handle = case.denoiser_of(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(error, match=match):
            yield
    finally:
        handle.remove()
    assert not calls
    assert torch.equal(case.run(pipe, [CAT, DOG]), plain)


ARGUMENTS: list[tuple[Any, dict[str, Any], str]] = [
    ("a red cat", {}, "at least one edit"),
    ([CAT], {}, "at least one edit"),
    ([CAT, None], {}, "list of texts"),
    ([CAT, DOG], {"mode": "swap"}, "auto, replace, refine"),
    ([CAT, DOG], {"mode": ["replace", "refine"]}, "2 entries for 1 edits"),
    ([CAT, DOG], {"cross_replace": 1.2}, "cross_replace=1.2 is outside"),
    ([CAT, DOG], {"cross_replace": -0.1}, "outside"),
    ([CAT, DOG], {"cross_replace": (0.8, 0.2)}, "start <= stop"),
    ([CAT, DOG], {"cross_replace": float("nan")}, "=nan is not a window"),
    ([CAT, DOG], {"cross_replace": {"dog": 2.0}}, r"cross_replace\['dog'\]=2.0 is outside"),
    ([CAT, DOG], {"cross_replace": {3: 0.5}}, "words as keys"),
    ([CAT, DOG], {"cross_replace": "always"}, "not a window"),
    ([CAT, DOG], {"self_replace": (0.1, 0.2, 0.3)}, "self_replace"),
    ([CAT, DOG], {"self_resolution": 0}, "side of a grid"),
    ([CAT, DOG], {"self_resolution": "1/4"}, "side of a grid"),
    ([CAT, DOG], {"reweight": [{"dog": 1.0}, None]}, "2 entries for 1 edits"),
    ([CAT, DOG], {"reweight": {"dog": "much"}}, r"reweight\['dog'\]='much'"),
    ([CAT, DOG], {"reweight": {"dog": float("inf")}}, "finite"),
    ([CAT, DOG], {"reweight": ["dog"]}, "{word: gain}"),
    ([CAT, DOG], {"reweight_window": 3}, "reweight_window=3 is outside"),
    ([CAT, DOG], {"blend": ["cat", "dog", "dog"]}, "3 entries for 2 prompts"),
    ([CAT, DOG], {"blend": ["cat", 3]}, "neither a word"),
    ([CAT, DOG], {"blend": True}, "neither a word"),
    ([CAT, DOG], {"blend": "a", "subtract": ["red"]}, "subtract.*1 entries for 2 prompts"),
    ([CAT, DOG], {"subtract": "square"}, "takes places from blend="),
    ([CAT, DOG], {"blend": "a", "blend_start": 1.5}, "blend_start"),
    ([CAT, DOG], {"blend": "a", "blend_threshold": 1.0}, "blend_threshold=1.0"),
    ([CAT, DOG], {"blend": "a", "blend_threshold": (0.3, -0.1)}, "blend_threshold"),
    ([CAT, DOG], {"blend": "a", "blend_threshold": (0.3, 0.3, 0.3)}, "blend_threshold"),
    ([CAT, DOG], {"blend": "a", "blend_threshold": "high"}, "blend_threshold"),
]


@pytest.mark.parametrize(("prompts", "options", "match"), ARGUMENTS)
def test_arguments_alone(prompts: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        PromptToPrompt(prompts, **options)


LONG = " ".join(["cat"] * 75 + ["dog"])

ON_THE_PIPELINE: list[tuple[list[str], dict[str, Any], type[HookctlError], str]] = [
    ([CAT, DOG], {"blend": ["cat", "cat"]}, WordError, r"blend: 'cat' .*whose words are.*'dog'"),
    ([CAT, DOG], {"blend": "a", "subtract": [None, "sqare"]}, WordError, "did you mean 'square'"),
    ([CAT, DOG], {"reweight": {"cat": 2.0}}, WordError, "reweight: 'cat' is not in the prompt"),
    ([CAT, DOG, CAT], {"reweight": [{"cat": 2.0}, None]}, WordError, "reweight: 'cat'"),
    ([CAT, DOG], {"cross_replace": {"bird": 0.5}}, WordError, "cross_replace: 'bird'"),
    ([CAT, SHORT], {"mode": "replace"}, AlignmentError, "7 and .* has 2: use 'refine'"),
    ([CAT, LONG], {"reweight": {"dog": 2}}, WordError, "reweight: 'dog' does not fit into the 77"),
    ([CAT, DOG], {"self_resolution": 0.05}, InputError, "their resolutions are 1/8, 1/4"),
    ([CAT, DOG], {"sites": "cross up7"}, InputError, "matches none"),
]


@pytest.mark.parametrize(("prompts", "options", "error", "match"), ON_THE_PIPELINE)
def test_arguments_on_a_pipeline(
    prompts: list[str], options: dict[str, Any], error: type[HookctlError], match: str
) -> None:
    """Known before the pipeline is called at all: on entering the context."""
    edit = PromptToPrompt(prompts, **options)
    with refused("sd15", error, match), control(made("sd15"), edit):
        pytest.fail("the context was entered")


def test_one_gain_for_several_edits_needs_the_word_in_one_of_them() -> None:
    with control(made("sd15"), PromptToPrompt([CAT, DOG, CAT], reweight={"cat": 2.0})):
        pass


CALLS: list[tuple[Any, str]] = [
    ([DOG, CAT], "call pipe\\(edit.prompts"),
    ([CAT], "the pipeline was called with \\['a red cat"),
    ([CAT, DOG, DOG], "call pipe\\(edit.prompts"),
]


@pytest.mark.parametrize(("prompts", "match"), CALLS)
def test_other_prompts_than_the_edits(prompts: list[str], match: str) -> None:
    edit = PromptToPrompt([CAT, DOG])
    with refused("sd15", InputError, match), control(made("sd15"), edit):
        zoo.PIPELINES["sd15"].run(made("sd15"), prompts)


def test_embeddings_instead_of_prompts() -> None:
    pipe = made("sd15")
    text = torch.zeros(2, 77, 32)
    with (
        refused("sd15", InputError, "embeddings instead of prompts"),
        control(pipe, PromptToPrompt([CAT, DOG])),
    ):
        pipe(prompt_embeds=text, negative_prompt_embeds=text, num_inference_steps=1)


def test_more_tokens_than_this_call_encodes() -> None:
    """The call's own max_sequence_length counts, not the encoder's: it cuts, and that is told."""
    edit = PromptToPrompt([CAT, DOG])
    with pytest.warns(HookctlWarning, match="takes 6 tokens.* does not see 'blue square'"):
        with control(made("flux"), edit):
            zoo.PIPELINES["flux"].run(made("flux"), edit.prompts, max_sequence_length=6)
    named = PromptToPrompt([CAT, DOG], reweight={"square": 2.0})
    with control(made("flux"), named), pytest.raises(WordError, match="does not fit into the 6"):
        zoo.PIPELINES["flux"].run(made("flux"), named.prompts, max_sequence_length=6)


@pytest.mark.parametrize(
    "second",
    [{}, {"cross_replace": 0.0}, {"self_replace": 0.0, "cross_replace": (0.7, 0.9)}],
    ids=["both", "self", "cross"],
)
def test_two_of_them_on_the_same_rows(second: dict[str, Any]) -> None:
    one, two = PromptToPrompt([CAT, DOG]), PromptToPrompt([CAT, DOG], **second)
    with refused("sd15", ConflictError, "both claim the"), control(made("sd15"), one, two):
        pytest.fail("the context was entered")


def test_two_of_them_in_step() -> None:
    one = PromptToPrompt([CAT, DOG], cross_replace=0.4, self_replace=0.4)
    two = PromptToPrompt([CAT, DOG], cross_replace=(0.4, 1.0), self_replace=(0.4, 1.0))
    with control(made("sd15"), one, two):
        zoo.PIPELINES["sd15"].run(made("sd15"), one.prompts, generator=one.generators())
    late = {"default": 0.0, "dog": (0.8, 1.0)}
    three = PromptToPrompt([CAT, DOG], cross_replace=late, self_replace=0.0)
    with control(made("sd15"), PromptToPrompt([CAT, DOG], cross_replace=0.8), three):
        pass


def test_a_denoiser_without_words() -> None:
    pipe = made("sd15")
    with (
        refused("sd15", UnsupportedError, "has no tokenizer"),
        control(pipe.unet, PromptToPrompt([CAT, DOG])),
    ):
        pytest.fail("the context was entered")


def test_prompts_are_named_where_they_do_not_come_first() -> None:
    """klein takes its first argument for an image."""
    with refused("flux2_klein", InputError, r"call pipe\(prompt=edit.prompts, ...\)"):
        with control(made("flux2_klein"), PromptToPrompt([CAT, DOG])):
            zoo.PIPELINES["flux2_klein"].run(made("flux2_klein"), [DOG, CAT])
