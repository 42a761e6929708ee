"""HunyuanVideo: further texts, which its model refines one by one, beside the video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import Branch, Editor, control
from hookctl.loop.prompts import encode
from hookctl.recipes import NAG, RegionalPrompts
from tests.families.subjects import error
from tests.recipes.literal_nag import drawn_with
from tests.zoo.wild import WILD

A, B = "a red cat", "a blue dog and a green bird"
NEGATIVES = ["an old green bird", "a dog"]
TEMPLATE = {"template": "say {} now", "crop_start": 1}
LEFT, FULL = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)


def made(dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline whose texts are all the same to its second encoder, which makes one vector."""
    pipe = WILD["HunyuanVideoPipeline"].make().to(dtype)
    pooled = pipe._get_clip_prompt_embeds
    pipe._get_clip_prompt_embeds = lambda prompt, *args, **kwargs: pooled(
        ["a photo"] * len(prompt), *args, **kwargs
    )
    return pipe


def drawn(pipe: Any, *prompts: str, guidance: float = 1.0, **more: Any) -> Tensor:
    latents: Tensor = pipe(
        prompt=list(prompts),
        negative_prompt=["blurry"] * len(prompts),
        true_cfg_scale=guidance,
        num_inference_steps=2,
        height=32,
        width=32,
        num_frames=9,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="latent",
        return_dict=False,
        **{"prompt_template": TEMPLATE, "max_sequence_length": 16, **more},
    )[0]
    return latents


def counting(pipe: Any, text: str) -> Tensor:
    """The embeddings of a text's own tokens, [tokens, channels]."""
    found = encode(pipe, [text], {"prompt_template": TEMPLATE, "max_sequence_length": 40})
    assert found.mask is not None and not found.mask.all()
    return found.sequence[0][found.mask[0]]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("paper", [False, True])
def test_one_full_region_is_a_run_of_its_text(paper: bool, guidance: float) -> None:
    pipe = made(torch.float64)
    wanted, plain = drawn(pipe, B, guidance=guidance), drawn(pipe, A, guidance=guidance)
    with control(pipe, RegionalPrompts([B], [FULL], base=0.0, paper=paper)):
        found = drawn(pipe, A, guidance=guidance)
    assert error(found, wanted) < 1e-9 and error(plain, wanted) > 1e-3


def test_texts_of_several_lengths_and_rows_of_their_own() -> None:
    """A longer text than the run's own, and another for each prompt."""
    pipe = made(torch.float64)
    wanted = torch.cat([drawn(pipe, B)[:1], drawn(pipe, A, A)[1:]])
    edit = RegionalPrompts([[counting(pipe, B)], []], [[FULL], []], base=0.0)
    with control(pipe, edit):
        found = drawn(pipe, A, A, max_sequence_length=12)
    assert error(found, wanted) < 1e-9


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_nag_as_published(guidance: float) -> None:
    pipe = made(torch.float64)
    plain = drawn(pipe, A, A, guidance=guidance)
    like = {"prompt_template": TEMPLATE, "max_sequence_length": 16}
    negative, image = encode(pipe, NEGATIVES, like), plain[0, 0].numel()
    calls = 2 if guidance > 1 else 1
    for scale, tau, alpha in ((5.0, 2.5, 0.25), (3.0, 1.2, 0.5)):
        with control(pipe, NAG(NEGATIVES, scale=scale, tau=tau, alpha=alpha)):
            got = drawn(pipe, A, A, guidance=guidance)
        settings = (scale, tau, alpha, 1)
        span, rows = (0, image), slice(0, 2)
        with drawn_with(
            pipe.transformer, negative.sequence, negative.mask, span, rows, *settings, calls=calls
        ):
            want = drawn(pipe, A, A, guidance=guidance)
        assert error(got, want) < 1e-9, scale
        assert error(got, plain) > 1e-4


def test_nothing_asked_is_bit_identical() -> None:
    pipe = made()
    plain = drawn(pipe, A, B, guidance=4.0)
    for edit in (
        RegionalPrompts([B], [LEFT], base=1.0),
        RegionalPrompts([B], [LEFT], stop=0.0),
        NAG("blurry", scale=1.0),
    ):
        with control(pipe, edit, strict=False):
            assert torch.equal(drawn(pipe, A, B, guidance=4.0), plain)
    with control(pipe, RegionalPrompts([B], [LEFT])):
        assert not torch.equal(drawn(pipe, A, B, guidance=4.0), plain)
    assert torch.equal(drawn(pipe, A, B, guidance=4.0), plain)


@pytest.mark.parametrize("text", [A, B])
def test_a_branch_of_a_text_of_its_own_length(text: str) -> None:
    """Its padding is hidden, as that of the pipeline's own texts is."""

    pipe = made(torch.float64)
    embeddings = counting(pipe, text)

    class Beside(Editor):
        def branches(self, state: Any) -> Any:
            return {"beside": Branch(text=embeddings[None])}

        def combine(self, predictions: Any) -> Tensor:
            return predictions["beside"]

    wanted, plain = drawn(pipe, text), drawn(pipe, "a green square")
    with control(pipe, Beside()):
        found = drawn(pipe, "a green square", max_sequence_length=12)
    assert error(found, wanted) < 1e-9 and error(plain, wanted) > 1e-4
