"""`Maps`: what it records, against explicit softmax, and that it changes nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hookctl import Maps, control
from hookctl.errors import HookctlError, InputError, SelectorError, UnsupportedError, WordError
from hookctl.recipes import PromptToPrompt
from tests import zoo
from tests.hookctl.maps.explicit import Explicit
from tests.zoo.transformers import T5_TOKENS

CAT = "a red cat above a blue square"
DOG = "a green dog"
FAMILIES = ["sd15", "sdxl", "sd3", "flux", "pixart", "animatediff", "wan"]


@cache
def made(family: str) -> Any:
    return zoo.PIPELINES[family].make()


# family: keys of a call with text, where its text stands, rows of the prompt in a guided call
TEXT = {
    "sd15": (77, slice(0, 77), -1),
    "sdxl": (77, slice(0, 77), -1),
    "sd3": (64 + 77 + T5_TOKENS, slice(64, None), -1),
    "flux": (T5_TOKENS + 64, slice(0, T5_TOKENS), -1),
    "pixart": (T5_TOKENS, slice(0, T5_TOKENS), -1),
    "wan": (T5_TOKENS, slice(0, T5_TOKENS), -1),
}
# 'cat' in 'a red cat ...', by stretch
TOKENS = {"sd15": [3], "sdxl": [3], "sd3": [3, 77 + 2], "flux": [2], "pixart": [2], "wan": [2]}


@pytest.mark.parametrize("family", list(TEXT))
def test_values_are_those_of_the_softmax(family: str) -> None:
    case, pipe = zoo.PIPELINES[family], made(family)
    keys, text, row = TEXT[family]
    with Explicit(case.denoiser_of(pipe), keys) as explicit:
        case.run(pipe, CAT)
    with control(pipe, Maps("cat")) as session:
        case.run(pipe, CAT)
    maps = session.maps["cat"].where(steps=[0])
    sites = [site.path for site in session.sites if site.kind in ("cross", "joint")]
    assert set(maps.sites) == set(sites)
    assert len(maps.records) == len(sites)
    # Sequential guidance calls the denoiser with the prompt first.
    seen = explicit.seen[: len(sites)]
    ran = {record.site.path: record.map for record in maps.records}
    assert len(seen) == len(ran)
    for p, values in zip(seen, ran.values(), strict=True):
        image = p[row][:, text]
        image = image[T5_TOKENS:] if family == "flux" else image[: values.numel()]
        expected = image[:, TOKENS[family]].sum(-1)
        torch.testing.assert_close(values.flatten(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "animatediff", "wan"])
def test_all_tokens_together_are_all_attention(family: str) -> None:
    case, pipe = zoo.PIPELINES[family], made(family)

    class All(Maps):
        def _tokens(self, call: Any, row: Any) -> Any:
            start, stop = call.spans.text_keys
            return (("all", tuple(range(stop - start))),)

    with control(pipe, All()) as session:
        case.run(pipe, CAT)
    for record in session.maps["all"].records:
        torch.testing.assert_close(record.map, torch.ones_like(record.map))
        assert record.map.shape[0] == case.frames


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_changes_nothing(family: str) -> None:
    case, pipe = zoo.PIPELINES[family], made(family)
    before = case.run(pipe, [CAT, DOG])
    with control(pipe, Maps(mean=False)) as session:
        assert torch.equal(case.run(pipe, [CAT, DOG]), before)
    assert torch.equal(case.run(pipe, [CAT, DOG]), before)
    assert session.maps.words == ("a", "red", "cat", "above", "blue", "square", "green", "dog")
    assert session.maps["cat"].prompts == (0,)
    assert session.maps["a"].prompts == (0, 1)
    assert session.maps["dog"].steps == (0, 1)
    map = session.maps["dog"].mean()
    assert map.isfinite().all() and map.min() >= 0 and map.max() <= 1


def test_a_word_or_phrase_of_one_prompt() -> None:
    case, pipe = zoo.PIPELINES["sd15"], made("sd15")
    with control(pipe, Maps("Red cat", "green", "Red cat")) as session:
        case.run(pipe, [CAT, DOG], n=2)
    assert session.maps.words == ("Red cat", "green")
    assert session.maps["Red cat"].prompts == (0,)
    assert session.maps["green"].prompts == (1,)
    assert {record.image for record in session.maps["green"].records} == {0, 1}
    with control(pipe, Maps("red", "cat")) as parts:
        case.run(pipe, [CAT, DOG], n=2)
    whole = session.maps["Red cat"].records[0].map
    both = parts.maps["red"].records[0].map + parts.maps["cat"].records[0].map
    torch.testing.assert_close(whole, both)


def test_by_step_site_and_grid() -> None:
    case, pipe = zoo.PIPELINES["sd15"], made("sd15")
    with control(pipe, Maps("cat", sites="cross up", start=0.25, stop=0.75)) as session:
        case.run(pipe, CAT, steps=4)
    maps = session.maps["cat"]
    assert maps.steps == (1, 2)
    assert maps.grids == ((4, 4), (8, 8), (16, 16))
    assert all(path.startswith("up_blocks") and path.endswith("attn2") for path in maps.sites)
    one = maps.where(site=maps.sites[0], steps=[2])
    assert len(one.records) == 1
    assert torch.equal(one.mean(), one.records[0].map[0])
    assert maps.where(grid=(8, 8)).mean().shape == (8, 8)
    assert maps.mean(size=(32, 32)).shape == (32, 32)


def test_a_new_run_forgets_the_last() -> None:
    case, pipe = zoo.PIPELINES["sd15"], made("sd15")
    with control(pipe, Maps()) as session:
        case.run(pipe, CAT)
        count = len(session.maps["a"].records)
        case.run(pipe, DOG)
    assert "cat" not in session.maps
    assert len(session.maps["a"].records) == count


@pytest.mark.parametrize("first", [True, False])
def test_edits_of_the_stack_are_seen(first: bool) -> None:
    """Whichever stands first."""
    prompts = [CAT, "a red dog above a blue square"]
    case, pipe, edit = zoo.PIPELINES["sd15"], made("sd15"), PromptToPrompt(prompts)
    editors = (Maps("cat", "dog"), edit) if first else (edit, Maps("cat", "dog"))
    with control(pipe, edit):
        alone = case.run(pipe, prompts, generator=edit.generators())
    with control(pipe, *editors) as session:
        assert torch.equal(case.run(pipe, prompts, generator=edit.generators()), alone)
    source = session.maps["cat"].where(steps=[0]).mean()
    torch.testing.assert_close(session.maps["dog"].where(steps=[0]).mean(), source)


class Largest(TorchDispatchMode):
    """The most elements that any one tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize(("family", "pixels"), [("sd15", 256), ("flux", 512)])
def test_no_matrix_of_all_tokens_by_all_tokens(family: str, pixels: int) -> None:
    """At 32 x 32 tokens."""
    case, pipe = zoo.PIPELINES[family], made(family)
    text = T5_TOKENS if family == "flux" else 77
    call = {"steps": 1, "guidance": 1.0, "height": pixels, "width": pixels}
    with Largest() as largest, control(pipe, Maps("cat", "blue", patches=[(0, 0)])) as session:
        case.run(pipe, CAT, **call)
    assert (32, 32) in session.maps["cat"].grids
    assert largest.numel < 1024 * 1024
    kept = sum(record.map.numel() for record in session.maps.records)
    assert kept <= 3 * 1024 * len(session.sites) < 1024 * text * len(session.sites)


ERRORS: list[tuple[str, dict[str, Any], type[HookctlError], str]] = [
    ("bird", {}, WordError, "'bird' is not in the prompt .* whose words are .*'cat'"),
    ("cta", {}, WordError, "did you mean 'cat'"),
    ("cat", {"sites": "self"}, SelectorError, "no sites where the image attends to the text"),
    ("cat", {"sites": "joint"}, SelectorError, "matches none"),
]


@pytest.mark.parametrize(("word", "options", "error", "match"), ERRORS)
def test_errors_come_before_the_denoiser(
    word: str, options: dict[str, Any], error: type[HookctlError], match: str
) -> None:
    case, pipe = zoo.PIPELINES["sd15"], made("sd15")
    before = case.run(pipe, CAT)
    calls: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=match), control(pipe, Maps(word, **options)):
        case.run(pipe, CAT)
    handle.remove()
    assert not calls
    assert torch.equal(case.run(pipe, CAT), before)


def test_embeddings_have_no_words() -> None:
    pipe, text = made("sd15"), torch.zeros(1, 77, 32)
    with pytest.raises(InputError, match="without text prompts"), control(pipe, Maps()):
        pipe(prompt_embeds=text, negative_prompt_embeds=text, num_inference_steps=1)


def test_arguments() -> None:
    with pytest.raises(InputError, match="words or phrases"):
        Maps("cat", " ")
    with pytest.raises(InputError, match="give a start before the stop"):
        Maps("cat", start=0.8, stop=0.2)
    with pytest.raises(UnsupportedError, match="no tokenizer"), control(made("sd15").unet, Maps()):
        pytest.fail("the context was entered")
