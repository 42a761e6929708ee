"""Prompt-to-Prompt against the paper's matrices, through whole pipelines in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from hookctl import control
from hookctl.recipes import PromptToPrompt
from tests import zoo
from tests.marks import examples
from tests.recipes.literal_prompt_to_prompt import (
    TOKENS,
    Controller,
    Everywhere,
    Processor,
    as_matrix,
    shifted,
)
from tests.recipes.runs import made, relative
from tests.zoo.transformers import T5_TOKENS

STEPS = 5
FEW = 3  # where windows are not looked at
CAT = "a red cat above a blue square"
DOG = "a red dog above a blue square"
SQUIRREL = "a red squirrel above a blue square"  # two tokens for one
LONGER = "a photo of a red cat above a green square"


def double(name: str) -> Any:
    return made(name, torch.float64)


def literally(
    name: str, controller: Controller | None, edit: PromptToPrompt, **call: Any
) -> Tensor:
    """The run of the literal implementation, from the same noise."""
    pipe = double(name)
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Processor(controller))
    if controller is not None:
        call["callback_on_step_end"] = controller.after_step
    try:
        return zoo.PIPELINES[name].run(pipe, edit.prompts, generator=edit.generators(), **call)
    finally:
        pipe.unet.set_attn_processor(before)


def controlled(name: str, edit: PromptToPrompt, **call: Any) -> Tensor:
    pipe = double(name)
    with control(pipe, edit):
        return zoo.PIPELINES[name].run(pipe, edit.prompts, generator=edit.generators(), **call)


@cache
def _plain(name: str, prompts: tuple[str, ...]) -> Tensor:
    generators = PromptToPrompt(prompts).generators()
    return zoo.PIPELINES[name].run(double(name), prompts, steps=STEPS, generator=generators)


def plain(name: str, prompts: list[str]) -> Tensor:
    """The run without any edit, from the same noise."""
    return _plain(name, tuple(prompts))


def test_the_literal_processor_is_plain_attention() -> None:
    result = literally("sd15", None, PromptToPrompt([CAT, DOG]), steps=STEPS)
    assert relative(result, plain("sd15", [CAT, DOG])) < 1e-12


# (prompts, arguments of the recipe, the same in the words of the literal implementation)
BOTH = ["sd15", "sdxl"]
CASES: dict[str, tuple[list[str], list[str], dict[str, Any], dict[str, Any]]] = {
    "replace": (["sd15"], [CAT, DOG], {}, {}),
    "replace, one token by two": (BOTH, [CAT, SQUIRREL], {}, {}),
    "replace, two tokens by one": (["sd15"], [SQUIRREL, CAT], {}, {}),
    "replace, two words": (["sd15"], [CAT, "a green squirrel above a red square"], {}, {}),
    "refine": (["sd15"], [CAT, LONGER], {}, {"kind": "refine"}),
    "refine, words left out": (["sd15"], [LONGER, CAT], {}, {"kind": "refine"}),
    "refine, as many words": (
        ["sd15"],
        [CAT, SQUIRREL],
        {"mode": "refine"},
        {"kind": "refine"},
    ),
    "reweight alone": (
        ["sd15"],
        [CAT, CAT],
        {"reweight": {"cat": 3.0}},
        {"kind": None, "equalizers": [{"cat": 3.0}]},
    ),
    "reweight, negative and zero": (
        ["sd15"],
        [CAT, CAT],
        {"reweight": {"cat": -2.0, "blue": 0.0}},
        {"kind": None, "equalizers": [{"cat": -2.0, "blue": 0.0}]},
    ),
    "reweight over replace": (
        ["sd15"],
        [CAT, SQUIRREL],
        {"reweight": {"squirrel": 2.5}},
        {"equalizers": [{"squirrel": 2.5}]},
    ),
    "reweight over refine": (
        BOTH,
        [CAT, LONGER],
        {"reweight": {"photo": -1.5, "cat": 2.0}},
        {"kind": "refine", "equalizers": [{"photo": -1.5, "cat": 2.0}]},
    ),
    "windows by word": (
        BOTH,
        [CAT, DOG],
        {"cross_replace": {"default": 0.6, "dog": (0.2, 0.4), "red": (0.5, 1.0)}},
        {"cross": {"default": 0.6, "dog": (0.2, 0.4), "red": (0.5, 1.0)}},
    ),
    "windows by word, without a default": (
        ["sd15"],
        [CAT, DOG],
        {"cross_replace": {"dog": 0.2}, "self_replace": 0.0},
        {"cross": {"dog": 0.2}, "self_steps": 0.0},
    ),
    "self window": (
        ["sd15"],
        [CAT, DOG],
        {"cross_replace": 0.0, "self_replace": (0.2, 0.8)},
        {"cross": 0.0, "self_steps": (0.2, 0.8)},
    ),
    "blend": (
        ["sd15"],
        [CAT, DOG],
        {"blend": ["cat", "dog"], "blend_threshold": 0.9},
        {"blend": [["cat"], ["dog"]], "thresholds": (0.9, 0.9)},
    ),
    "blend, several words, subtract": (
        BOTH,
        [CAT, LONGER],
        {
            "blend": [["red", "cat"], ["photo", "cat"]],
            "subtract": ["square", None],
            "blend_start": 0.4,
            "blend_threshold": (0.5, 0.8),
        },
        {
            "kind": "refine",
            "blend": [["red", "cat"], ["photo", "cat"]],
            "subtract": [["square"], []],
            "start": 0.4,
            "thresholds": (0.5, 0.8),
        },
    ),
    "several edits": (
        BOTH,
        [CAT, DOG, SQUIRREL],
        {
            "reweight": [None, {"squirrel": 2.0}],
            "blend": ["cat", "dog", "squirrel"],
            "blend_threshold": 0.9,
        },
        {
            "thresholds": (0.9, 0.9),
            "equalizers": [{}, {"squirrel": 2.0}],
            "blend": [["cat"], ["dog"], ["squirrel"]],
        },
    ),
}


# float64 runs against the literal code on every family
ON_FAMILIES = [(name, key) for key, case in CASES.items() for name in case[0]]
TWICE = [(name, key) for name, key in ON_FAMILIES if name == "sd15" or key == "several edits"]


@pytest.mark.parametrize(("name", "case"), examples(ON_FAMILIES, TWICE))
def test_equals_the_official_matrices(name: str, case: str) -> None:
    _, prompts, ours, theirs = CASES[case]
    edit = PromptToPrompt(prompts, paper=True, **ours)
    controller = Controller(prompts, double(name).tokenizer, STEPS, **theirs)
    expected = literally(name, controller, edit, steps=STEPS)
    result = controlled(name, edit, steps=STEPS)
    assert relative(result, expected) < 1e-9  # float64
    assert relative(expected[1:], plain(name, prompts)[1:]) > 1e-3  # the edit did something
    if controller.blend is not None and edit.local is not None:
        for i in edit.edits:
            mask = edit.local.mask(i)
            assert mask is not None and torch.equal(mask, controller.masks[-1][i])
            assert 0 < mask.double().mean() < 1


@pytest.mark.slow
def test_self_attention_keeps_fine_grids_to_itself() -> None:
    """At a latent of 32 x 32 the 16 x 16 sites are replaced and the 32 x 32 sites are not."""
    size = {"height": 256, "width": 256, "steps": 1, "guidance": 1.0}
    for cap, ours in ((16**2, {}), (8**2, {"self_resolution": 0.25})):
        edit = PromptToPrompt([CAT, DOG], cross_replace=0.0, self_replace=1.0, **ours)
        tokenizer = double("sd15").tokenizer
        controller = Controller(edit.prompts, tokenizer, 1, cross=0.0, self_steps=1.0, cap=cap)
        expected = literally("sd15", controller, edit, **size)
        assert relative(controlled("sd15", edit, **size), expected) < 1e-9


# -- without the official misalignment ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "token_map"),
    [([CAT, SQUIRREL], shifted(1, 2, 3)), ([SQUIRREL, CAT], shifted(2, 1, 3))],
    ids=["one by two", "two by one"],
)
@pytest.mark.parametrize("name", BOTH)
def test_unequal_tokens_stay_aligned(name: str, prompts: list[str], token_map: Tensor) -> None:
    """Behind a word of another length, words still meet the same words."""
    edit = PromptToPrompt(prompts)
    tokenizer = double(name).tokenizer
    flags = torch.ones(TOKENS, dtype=torch.float64)
    fixed = Controller(prompts, tokenizer, FEW, maps=[(token_map, flags)])
    result = controlled(name, edit, steps=FEW)
    assert relative(result, literally(name, fixed, edit, steps=FEW)) < 1e-9  # float64
    official = literally(name, Controller(prompts, tokenizer, FEW), edit, steps=FEW)
    assert relative(official[1:], result[1:]) > 1e-3


def test_refine_aligns_whole_words_and_padding() -> None:
    edit = PromptToPrompt([CAT, "a red squirrel cat above a blue square"])
    sources = [0, 1, 2, -1, -1, 3, *range(4, TOKENS - 2)]
    mapper = torch.tensor(sources)
    flags = (mapper >= 0).double()
    maps = [(as_matrix(mapper), flags)]
    controller = Controller(edit.prompts, double("sd15").tokenizer, FEW, maps=maps)
    result = controlled("sd15", edit, steps=FEW)
    assert relative(result, literally("sd15", controller, edit, steps=FEW)) < 1e-9  # float64


def test_words_are_found_as_written_by_people() -> None:
    """Case, punctuation, doubled spaces and phrases, where the official code finds nothing."""
    prompts = ["A red cat,  above a blue square", "A red squirrel,  above a blue square"]
    edit = PromptToPrompt(prompts, blend=["CAT", "red squirrel"], reweight={"Squirrel": 2.0})
    result = controlled("sd15", edit, steps=STEPS)
    assert relative(result[1], plain("sd15", prompts)[1]) > 1e-3


def test_without_guidance() -> None:
    """Half of the batch is not the conditional half then."""
    edit = PromptToPrompt([CAT, DOG], paper=True)
    controller = Controller(edit.prompts, double("sd15").tokenizer, FEW)
    expected = literally("sd15", controller, edit, steps=FEW, guidance=1.0)
    result = controlled("sd15", edit, steps=FEW, guidance=1.0)
    assert relative(result, expected) < 1e-9  # float64


def test_a_scheduler_of_second_order() -> None:
    """Windows count steps, of which Heun takes two for a step."""
    pipe, before = double("sd15"), double("sd15").scheduler
    pipe.scheduler = HeunDiscreteScheduler.from_config(before.config)
    try:
        pipe.scheduler.set_timesteps(3)
        steps = len(pipe.scheduler.timesteps)
        assert steps > 3
        ours = {"blend": ["cat", "dog"], "blend_threshold": 0.9, "cross_replace": 0.5}
        edit = PromptToPrompt([CAT, DOG], paper=True, **ours)
        theirs = {"blend": [["cat"], ["dog"]], "thresholds": (0.9, 0.9), "cross": 0.5}
        controller = Controller(edit.prompts, pipe.tokenizer, steps, **theirs)
        expected = literally("sd15", controller, edit, steps=3)
        assert relative(controlled("sd15", edit, steps=3), expected) < 1e-9  # float64
    finally:
        pipe.scheduler = before


def test_reweight_in_a_window_of_its_own() -> None:
    """Without the source's attention, the own map is rescaled, until the window ends."""
    edit = PromptToPrompt(
        [CAT, DOG], cross_replace=0.0, reweight={"dog": -2.0}, reweight_window=(0.4, 0.8)
    )
    own = (torch.eye(TOKENS, dtype=torch.float64), torch.zeros(TOKENS, dtype=torch.float64))
    window = (2.1 / (STEPS + 1), 4.1 / (STEPS + 1))  # steps 2 and 3 of the table
    controller = Controller(
        edit.prompts,
        double("sd15").tokenizer,
        STEPS,
        cross=window,
        maps=[own],
        equalizers=[{"dog": -2.0}],
    )
    expected = literally("sd15", controller, edit, steps=STEPS)
    assert relative(controlled("sd15", edit, steps=STEPS), expected) < 1e-9  # float64


# -- other families ----------------------------------------------------------------------------


def blocks(*parts: Tensor) -> Tensor:
    return torch.block_diag(*parts).to(torch.float64)


def swap(family: str) -> tuple[Tensor, tuple[int, ...]]:
    """T of cat -> squirrel over the whole text of a family, and where 'squirrel' stands."""
    if family == "animatediff":
        return shifted(1, 2, 3), (3, 4)
    t5 = shifted(1, 2, 2, T5_TOKENS)  # no token before the words
    if family == "sd3":
        return blocks(shifted(1, 2, 3), t5), (3, 4, TOKENS + 2, TOKENS + 3)
    return t5, (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("family", ["sd3", "flux", "pixart", "wan", "animatediff"])
def test_equals_the_matrices_on_every_family(family: str, guided: bool) -> None:
    """Self, cross and joint attention, T5 padding masked or not, one call or two for guidance."""
    case, pipe = zoo.PIPELINES[family], double(family)
    token_map, word = swap(family)
    equalizer = torch.ones(len(token_map), dtype=torch.float64)
    equalizer[list(word)] = -1.5
    image = 64
    joint = {"sd3": slice(image, None), "flux": slice(0, T5_TOKENS)}.get(family)
    literal = Everywhere(
        token_map,
        torch.ones(len(token_map), dtype=torch.float64),
        equalizer,
        cross=3,
        self_steps=2,
        joint=joint,
        sequential=family in ("flux", "wan"),
        guided=guided,
        frames=case.frames,
    )
    edit = PromptToPrompt(
        [CAT, SQUIRREL], cross_replace=0.61, self_replace=0.5, reweight={"squirrel": -1.5}
    )
    call = {"steps": 4, "guidance": 4.0 if guided else 1.0, "generator": edit.generators()}
    with literal.instead(case.denoiser_of(pipe)):
        expected = case.run(pipe, edit.prompts, **call)
    call["generator"] = edit.generators()
    with control(pipe, edit):
        result = case.run(pipe, edit.prompts, **call)
    call["generator"] = edit.generators()
    plain_one = case.run(pipe, edit.prompts, **call)
    assert relative(expected[1:], plain_one[1:]) > 1e-3
    assert relative(result, expected) < 1e-9  # float64
