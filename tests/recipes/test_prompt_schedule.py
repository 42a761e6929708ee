"""Prompt schedules: as two plain runs spliced together, family by family, and what they refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.errors import ConflictError, HookctlError, InputError, UnsupportedError
from hookctl.recipes import PAG, AttendAndExcite, PromptSchedule, PromptToPrompt, RegionalPrompts
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.hookctl.loop.families import BY_NAME, FAMILIES, Family
from tests.recipes.runs import TWO, made, relative, with_scheduler
from tests.recipes.test_inversions_of_families import made as of_first_order
from tests.zoo.wild import WILD

SD15 = zoo.PIPELINES["sd15"]
EACH = [
    pytest.param(one.name, marks=() if one.name in ("sd15", "qwen_image") else pytest.mark.slow)
    for one in FAMILIES
]
CLOSE = 1e-6  # a text encoded alone, and in a batch


class Keep(Editor):
    """The latents after every step."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []

    def after(self, state: Any) -> None:
        self.latents.append(state.latents.clone())


class GoOn(Editor):
    """Go on from other latents after a step."""

    def __init__(self, latents: Tensor, step: int) -> None:
        self.latents, self.step = latents, step

    def after(self, state: Any) -> None:
        if state.clock.step == self.step:
            state.latents = self.latents


def without_memory(family: Family) -> Any:
    """A pipeline whose solver knows nothing of the steps before."""
    if family.name not in ("sd15", "sdxl"):
        return of_first_order(family)
    pipe = family.make()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def drawn(family: Family, pipe: Any, prompts: list[str], *editors: Editor, **more: Any) -> Tensor:
    with hookctl.control(pipe, *editors) if editors else hookctl.control(pipe, Keep()):
        latents: Tensor = family.drawn(
            pipe, 2.0 if family.guides else 1.0, steps=4, prompts=prompts, **more
        )
    return latents


@pytest.mark.parametrize("name", EACH)
def test_two_runs_spliced(name: str) -> None:
    """Texts of other lengths, in one row of a batch; nothing stays behind."""
    family = BY_NAME[name]
    pipe, keep, count = without_memory(family), Keep(), len(family.prompts)
    before = ["a red cat", "a blue dog"][:count]
    after = ["a green bird in the snow, wide", "a blue dog"][:count]
    first = drawn(family, pipe, before, keep)
    marks = fingerprint(pipe)
    want = drawn(family, pipe, after, GoOn(keep.latents[1], 1))
    edit = PromptSchedule(["a [red cat:green bird in the snow, wide:0.5]", "a blue dog"][:count])
    assert edit.prompts == before
    assert relative(drawn(family, pipe, edit.prompts, edit), want) < CLOSE
    assert relative(first, want) > 10 * CLOSE
    assert torch.equal(drawn(family, pipe, before), first)
    assert not differences(marks, fingerprint(pipe))


@pytest.mark.parametrize("name", EACH)
def test_a_prompt_that_stays_is_a_plain_run(name: str) -> None:
    family = BY_NAME[name]
    pipe, prompts = family.make(), list(family.prompts)
    plain = drawn(family, pipe, prompts)
    for end in ("1.0", "4"):
        edit = PromptSchedule([prompts[0], *(f"[{one}:a:{end}]" for one in prompts[1:])])
        with hookctl.control(pipe, edit, strict=False):
            found = family.drawn(pipe, 2.0 if family.guides else 1.0, steps=4, prompts=prompts)
        assert torch.equal(found, plain)


def test_alternation_and_the_negative_prompt() -> None:
    """A literal loop: the texts of each step, for both halves of the batch."""
    pipe = with_scheduler(DDIMScheduler)
    edit = PromptSchedule("a [cat|red dog]", negative="blurry[, dark:0.5]")
    with torch.no_grad():
        texts = {
            text: pipe.encode_prompt([text], "cpu", 1, False)[0]
            for text in ("a cat", "a red dog", "blurry", "blurry, dark")
        }
        pipe.scheduler.set_timesteps(4)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for i, t in enumerate(pipe.scheduler.timesteps):
            said = ("blurry" if i < 2 else "blurry, dark", "a red dog" if i % 2 else "a cat")
            both = torch.cat([texts[one] for one in said])
            u, c = pipe.unet(torch.cat([x] * 2), t, both).sample.chunk(2)
            x = pipe.scheduler.step(u + 4.0 * (c - u), t, x).prev_sample
    with hookctl.control(pipe, edit) as session:
        found = SD15.run(pipe, edit.prompts, edit.negatives, steps=4, guidance=4.0)
    assert relative(found, x) < 1e-5
    assert "changed the prompts" in session.report()


def test_beside_other_editors() -> None:
    """Added rows and added texts go with it."""
    pipe = made("sd15")
    edit = PromptSchedule(["a [red:green:0.5] cat", "a blue dog"])
    others = [PAG(sites="self @1/2"), RegionalPrompts(["a dog"], [(0, 0, 0.5, 1)])]
    keep = Keep()
    with hookctl.control(pipe, *others, keep):
        SD15.run(pipe, edit.prompts, steps=4)
    with hookctl.control(pipe, *others, GoOn(keep.latents[1], 1)):
        want = SD15.run(pipe, ["a green cat", "a blue dog"], steps=4)
    for order in ([edit, *others], [*others, edit]):
        with hookctl.control(pipe, *order):
            assert relative(SD15.run(pipe, edit.prompts, steps=4), want) < 2e-2  # PNDM remembers
    alone = [SD15.run(pipe, edit.prompts, steps=4)]
    assert error(want, alone[0]) > 1e-4


def test_editors_of_words_are_refused_where_words_change() -> None:
    edit = PromptSchedule(["a [red:green:0.5] cat", "a blue dog"])
    words = [["cat"], ["dog"]]
    late = AttendAndExcite(words, stop=0.8)
    for other in (hookctl.Maps("cat"), late, PromptToPrompt(edit.prompts)):
        with pytest.raises(ConflictError, match="words of the prompts.*act before the prompt"):
            hookctl.control(made("sd15"), edit, other).__enter__()
    early = AttendAndExcite(words, stop=0.5, thresholds={}, refinements=1)
    with hookctl.control(made("sd15"), edit, early):
        SD15.run(made("sd15"), edit.prompts, steps=4)
    same = PromptSchedule(["a red cat", "a [blue:blue:0.5] dog"])
    with hookctl.control(made("sd15"), same, hookctl.Maps("cat")) as session:
        SD15.run(made("sd15"), same.prompts)
    assert "cat" in session.maps.words


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schedule": "a [b:c:soon]"}, "PromptSchedule: schedule: .*'soon' is no time"),
        ({"schedule": []}, "PromptSchedule: schedule"),
        ({"schedule": 3}, "PromptSchedule: schedule"),
        ({"schedule": "a", "negative": ["b", "c"]}, "2 negative prompts and 1 prompts"),
    ],
)
def test_arguments(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PromptSchedule(**given)


def test_other_prompts_than_its_own() -> None:
    pipe, edit = made("sd15"), PromptSchedule(["a [red:green:0.5] cat"] * 2)
    with pytest.raises(InputError, match=r"was called with \['a red cat', 'a blue dog'\]"):
        with hookctl.control(pipe, edit):
            SD15.run(pipe, TWO)
    text = pipe.encode_prompt(edit.prompts, "cpu", 1, False)[0]
    with pytest.raises(InputError, match="was called with embeddings"):
        with hookctl.control(pipe, edit):
            pipe(prompt_embeds=text, guidance_scale=1.0, num_inference_steps=2)


def test_second_prompts() -> None:
    """The schedule does not know of what only the second encoder reads."""
    pipe, edit = made("sdxl"), PromptSchedule(["a [red:green:0.5] cat"] * 2)
    with pytest.raises(InputError, match="prompt_2='a house'"):
        with hookctl.control(pipe, edit):
            zoo.PIPELINES["sdxl"].run(pipe, edit.prompts, prompt_2=["a house"] * 2)


def test_embeddings_that_are_not_those_of_the_prompt() -> None:
    pipe, edit = made("sd15"), PromptSchedule("a [red:green:0.5] cat")
    text = pipe.encode_prompt(edit.prompts, "cpu", 1, False)[0]
    arguments = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    with hookctl.control(pipe, edit, texts=edit.prompts):
        pipe(prompt_embeds=text, **arguments)
    with pytest.raises(UnsupportedError, match="not give its denoiser what its encode_prompt make"):
        with hookctl.control(pipe, edit, texts=edit.prompts):
            pipe(prompt_embeds=2 * text, **arguments)


@pytest.mark.skipif(not hasattr(diffusers, "QwenImage21Pipeline"), reason="of newer diffusers")
def test_texts_that_are_read_in_the_first_step_alone() -> None:
    case = WILD["QwenImage21Pipeline"]
    pipe = case.make()
    with hookctl.control(pipe, PromptSchedule("a [red:blue:1] cat")):
        with pytest.raises(UnsupportedError, match="keeps the keys.*pass use_kv_cache=False"):
            case.draw(pipe, ["a red cat"], [""], [0])


def test_bare_denoisers_and_pipelines_without_texts() -> None:
    edit = PromptSchedule("a [red:green:0.5] cat")
    with pytest.raises(InputError, match="a bare denoiser encodes no prompts"):
        hookctl.control(made("sd15").unet, edit).__enter__()
    with pytest.raises(HookctlError, match="encode_prompt|text"):
        with hookctl.control(made("svd"), edit):
            zoo.PIPELINES["svd"].run(made("svd"), edit.prompts)
