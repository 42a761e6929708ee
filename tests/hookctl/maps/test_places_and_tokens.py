"""Maps of patches, of token positions and of the negative prompt, against explicit softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookctl import Maps, control
from hookctl.errors import InputError, SelectorError, UnsupportedError, WordError
from hookctl.maps import MapStore
from tests import zoo
from tests.hookctl.maps.explicit import Explicit
from tests.zoo.transformers import T5_TOKENS

CAT, DOG = "a red cat above a blue square", "a green dog"


def run(family: str, *editors: Any, prompts: Any = CAT, **call: Any) -> MapStore:
    case = zoo.PIPELINES[family]
    pipe = case.make()
    with control(pipe, *editors) as session:
        case.run(pipe, prompts, **{"steps": 1, **call})
    return session.maps


# -- patches ---------------------------------------------------------------------------------------

# family: kind of the sites, keys of their calls, which of them are the image's
LOOKS = {
    "sd15": ("self", 64, slice(0, 64)),
    "flux": ("joint", T5_TOKENS + 64, slice(T5_TOKENS, None)),
    "sd3": ("joint", 64 + 77 + T5_TOKENS, slice(0, 64)),
    "pixart": ("self", 64, slice(0, 64)),
}


@pytest.mark.parametrize("family", list(LOOKS))
def test_what_a_patch_looks_at(family: str) -> None:
    """On a grid of 8 x 8."""
    case = zoo.PIPELINES[family]
    kind, keys, image = LOOKS[family]
    pipe = case.make()
    with Explicit(case.denoiser_of(pipe), keys) as explicit:
        case.run(pipe, CAT, steps=2)
    maps = run(family, Maps(patches=[(0.3, 0.9), (1, 1)], mean=False, stop=0.5), steps=2)
    assert not maps.words
    for place, cell in (((0.3, 0.9), 2 * 8 + 7), ((1, 1), 63)):
        records = maps.patch(*place).where(grid=(8, 8)).records
        records = [record for record in records if record.site.kind == kind]
        assert len(records) > 1
        # Sequential guidance calls the denoiser with the prompt first.
        for record, p in zip(records, explicit.seen, strict=False):
            expected = p[-1, image, image][cell]
            torch.testing.assert_close(record.map.flatten(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sd15", "animatediff", "wan"])
def test_all_that_a_patch_looks_at_is_one(family: str) -> None:
    """In each frame, or over all of them where a site attends across frames."""
    maps = run(family, Maps(patches=[(0.5, 0.5)])).patch(0.5, 0.5)
    frames = zoo.PIPELINES[family].frames
    for record in maps.records:
        assert record.map.shape[0] == frames
        each = record.map.sum((-2, -1))
        whole = each.sum() if family == "wan" else each
        torch.testing.assert_close(whole, torch.ones_like(whole))
    assert maps.mean().shape == max(maps.grids)
    assert all("attn1" in site for site in maps.sites)


def test_patches_change_nothing_and_go_with_words() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    before = case.run(pipe, CAT)
    with control(pipe, Maps("cat", patches=[(0, 0)], sites="up")) as session:
        assert torch.equal(case.run(pipe, CAT), before)
    assert all(site.startswith("up") and "attn2" in site for site in session.maps["cat"].sites)
    assert all(site.startswith("up") and "attn1" in site for site in session.maps.patch(0, 0).sites)
    with pytest.raises(SelectorError, match="no sites where the image attends to itself"):
        run("sd15", Maps(patches=[(0, 0)], sites="cross"))


# -- tokens ----------------------------------------------------------------------------------------


def test_a_token_is_what_a_word_of_it_is() -> None:
    """Of joint and cross sites; of the one prompt and the other."""
    for family, token in (("sd15", 3), ("flux", 2)):
        maps = run(family, Maps("cat", tokens=[token, 0]), prompts=[CAT, DOG])
        own, word = maps.token(token), maps["cat"]
        assert own.prompts == (0, 1) and word.prompts == (0,)
        torch.testing.assert_close(own.where(prompt=0).mean(), word.mean())
        assert maps.token(0).mean().max() <= 1


def test_tokens_and_patches_need_no_text() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe, text = case.make(), torch.randn(1, 77, 32)
    with control(pipe, Maps(tokens=[4], patches=[(0, 0)])) as session:
        pipe(prompt_embeds=text, negative_prompt_embeds=text, num_inference_steps=1)
    assert session.maps.token(4).mean().isfinite().all()
    latents, unet = torch.randn(2, 4, 16, 16), case.make().unet
    with control(unet, Maps(tokens=[4]), rows=("uncond", "cond")) as session:
        unet(latents, 1, text.expand(2, -1, -1))
    assert session.maps.token(4).prompts == (0,)
    with pytest.raises(InputError, match=r"tokens=\(77,\) are not among the 77 keys"):
        run("sd15", Maps(tokens=[77]))


# -- the negative prompt ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "row", "token"), [("sd15", 0, 2), ("sdxl", 0, 2), ("wan", 0, 1)]
)
def test_words_of_the_negative_prompt(family: str, row: int, token: int) -> None:
    case = zoo.PIPELINES[family]
    pipe, keys = case.make(), 77 if family != "wan" else T5_TOKENS
    with Explicit(case.denoiser_of(pipe), keys) as explicit:
        case.run(pipe, CAT, "a cat", steps=1)
    reader = Maps("cat", negative=True)
    maps = run(family, reader, Maps("cat"), negatives="a cat")
    negative, positive = maps.word("cat", negative=True), maps["cat"]
    assert len(negative.records) == len(positive.records) > 0
    # Sequential guidance calls the denoiser with the negative prompt second.
    seen = explicit.seen[-len(negative.records) :]
    for record, p in zip(negative.records, seen, strict=True):
        expected = p[row][:, token]
        torch.testing.assert_close(record.map.flatten(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(negative.mean(), positive.mean())
    assert maps.words == ("cat",)


def test_every_word_of_the_negative_prompts() -> None:
    maps = run("sd15", Maps(negative=True), prompts=[CAT, DOG], negatives=["blurry", "bad art"])
    assert [key.title for key in maps.keys] == [
        f"{word} (negative)" for word in ("blurry", "bad", "art")
    ]
    assert maps.word("art", negative=True).prompts == (1,) and not maps.words
    both = run("sd15", Maps("cat", tokens=[2], negative=True), negatives="a cat")
    assert torch.equal(both.token(2, negative=True).mean(), both.word("cat", negative=True).mean())


def test_negative_prompts_without_words() -> None:
    with pytest.raises(WordError, match="'cat' is not in the prompt 'blurry'"):
        run("sd15", Maps("cat", negative=True))
    with pytest.raises(InputError, match="no words in"):
        run("sd15", Maps(negative=True), negatives="")
    with pytest.raises(InputError, match="no row sees the negative prompt; raise guidance_scale"):
        run("sd15", Maps("blurry", negative=True), guidance=1.0)
    with pytest.raises(UnsupportedError, match="does not say what its negative prompt is"):
        run("flux", Maps("blurry", negative=True))


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tokens": 3}, "Maps: tokens=3; give positions"),
        ({"tokens": [-1]}, "give positions of the text"),
        ({"tokens": [True]}, "give positions of the text"),
        ({"tokens": "cat"}, "give positions of the text"),
        ({"patches": (0.5, 0.5)}, r"Maps: patches=\(0.5, 0.5\); give places \(y, x\)"),
        ({"patches": [(0.5, 1.5)]}, "in fractions of the image"),
        ({"patches": [("a", 0)]}, "in fractions of the image"),
        ({"patches": [(float("nan"), 0)]}, "in fractions of the image"),
        ({"mean": "no"}, "Maps: mean='no'; give True or False"),
        ({"negative": None}, "Maps: negative=None; give True or False"),
    ],
)
def test_arguments(given: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Maps(**given)
