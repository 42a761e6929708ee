"""Texts of other lengths than the call's: as if each stood alone, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Branch, Editor
from hookctl.address.rows import COND
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.calls import predict
from hookctl.loop.prompts import EncodedTexts
from hookctl.recipes import LEDITSPlusPlus, MultiDiffusion, MultiInstanceSampler
from tests import zoo
from tests.families.subjects import error
from tests.hookctl.loop.families import BY_NAME, Family
from tests.zoo.wild import WILD

LONGER, SHORTER = "a green bird in the snow, wide", "a cat"
LEFT = (0.0, 0.0, 0.5, 1.0)
CLOSE = 1e-5
PADDED = [
    one
    for one in (
        Family("qwen_image", "true_cfg_scale"),
        Family("NucleusMoEImagePipeline", more={"max_sequence_length": 512}),  # behind its template
        Family("LuminaPipeline"),
    )
    if one.name in WILD or one.name in zoo.PIPELINES
]
WITH_PADDING = [*PADDED, Family("pixart")]  # of one length
EACH = pytest.mark.parametrize("family", PADDED, ids=[one.name for one in PADDED])


class Watch(Editor):
    """The conditional predictions of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def combine(self, predictions: Any) -> Tensor:
        if not self.found:
            self.found = {name: part.clone() for name, part in predictions.branches.items()}
        return predictions.guided


class Beside(Watch):
    """Texts in rows of their own, beside the pipeline's."""

    def begin(self, state: Any) -> None:
        self.texts = EncodedTexts(state, [LONGER, SHORTER])

    def branches(self, state: Any) -> Any:
        return {text: self.texts.branch(text) for text in (LONGER, SHORTER)}


class Instead(Watch):
    """One text in the place of the prompts', by a further call."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.again = text, torch.zeros(0)

    def begin(self, state: Any) -> None:
        self.texts = EncodedTexts(state, [self.text])

    def denoise(self, state: Any, proceed: Any) -> Any:
        if not len(self.again) and (rows := state.rows.where(branch=COND)):
            text, shift = self.texts.sequence(self.text), self.texts.shift(self.text)
            text = text if shift is None else text[shift == 0]
            self.again = predict(state, rows, text=text[None])
        return proceed()


def drawn(family: Family, pipe: Any, prompts: list[str], *editors: Editor) -> Tensor:
    with hookctl.control(pipe, *editors, strict=False):
        latents: Tensor = family.drawn(
            pipe, 2.0 if family.guides else 1.0, steps=2, prompts=prompts
        )
    return latents


def shown(family: Family, pipe: Any, prompts: list[str]) -> Tensor:
    """What a run of these prompts predicts in its first step."""
    watch = Watch()
    drawn(family, pipe, prompts, watch)
    return watch.found[COND]


@pytest.mark.parametrize("family", WITH_PADDING, ids=[one.name for one in WITH_PADDING])
@pytest.mark.parametrize(
    "own", [("a red cat", "a blue dog"), ("a red cat", LONGER + ", and a hat")]
)
def test_beside_the_call(family: Family, own: tuple[str, str]) -> None:
    """The pipeline's rows stay as they were, and each branch is that of a run of its text."""
    pipe, beside = family.make(), Beside()
    drawn(family, pipe, list(own), beside)
    plain = shown(family, pipe, list(own))
    assert error(beside.found[COND], plain) < CLOSE
    for text in (LONGER, SHORTER):
        alone = shown(family, pipe, [text, text])
        assert error(beside.found[text], alone) < CLOSE
        assert error(alone, plain) > 100 * CLOSE


@EACH
@pytest.mark.parametrize("text", [LONGER, SHORTER])
def test_in_the_place_of_the_call(family: Family, text: str) -> None:
    pipe, instead = family.make(), Instead(text)
    prompts = ["a red cat", "a blue dog"]
    drawn(family, pipe, prompts, instead)
    assert error(instead.found[COND], shown(family, pipe, prompts)) < CLOSE
    alone = shown(family, pipe, [text, text])
    again = instead.again[:, : alone.shape[1]]  # without a variance
    assert min(error(again, alone), error(-again, alone)) < CLOSE  # some are handed on negated


@pytest.mark.skipif("qwen_image" not in BY_NAME, reason="of newer diffusers")
@pytest.mark.parametrize("outside", [None, ""])
def test_recipes_with_texts_of_their_own(outside: str | None) -> None:
    """A text of each length for each prompt; without share or scale, the same bit for bit."""
    family = BY_NAME["qwen_image"]
    pipe, prompts = family.make(), list(family.prompts)
    plain = drawn(family, pipe, prompts)
    regions = [[LEFT], [LEFT]]
    texts = [[LONGER], [SHORTER]]
    for share in (0.0, 0.6):
        edit = MultiInstanceSampler(texts, regions, share=share, outside=outside)
        found = drawn(family, pipe, prompts, edit)
        assert bool(torch.isfinite(found).all())
        assert torch.equal(found, plain) is (share == 0)
    for scale in (0.0, 5.0):
        edits = LEDITSPlusPlus([LONGER, SHORTER], prompts=prompts, scale=scale)
        found = drawn(family, pipe, prompts, edits)
        assert torch.equal(found, plain) is (scale == 0)


# -- refused ---------------------------------------------------------------------------------------


class Never(Beside):
    """A branch of a text that is too short."""

    def begin(self, state: Any) -> None:
        pass

    def branches(self, state: Any) -> Any:
        return {"short": Branch(text=torch.zeros(1, 5, 32))}


def test_a_branch_that_nothing_would_hide() -> None:
    family = BY_NAME["sd15"]
    with pytest.raises(InputError, match=r"Never: branch 'short': text is \(1, 5, 32\); give .*77"):
        drawn(family, family.make(), list(family.prompts), Never())


def test_a_mask_of_another_length() -> None:
    class Masked(Never):
        def branches(self, state: Any) -> Any:
            return {"short": Branch(text=torch.zeros(1, 77, 32), mask=torch.ones(1, 5))}

    family = BY_NAME["sd15"]
    with pytest.raises(InputError, match=r"Masked: branch 'short': mask is \(1, 5\); .*\[1, 77\]"):
        drawn(family, family.make(), list(family.prompts), Masked())


@pytest.mark.skipif("CogView4Pipeline" not in WILD, reason="of newer diffusers")
def test_texts_that_nothing_would_hide() -> None:
    """CogView4 pads to multiples of 16, which it sees."""
    family = Family("CogView4Pipeline", more={"max_sequence_length": 64})
    pipe, prompts = family.make(), ["a red cat", "a blue dog"]
    said = r"MultiDiffusion: texts of 32 tokens can't stand in rows of a call whose own"
    with pytest.raises(UnsupportedError, match=said):
        edit = MultiDiffusion([LONGER + ", with a hat and dogs"], [LEFT], tile=8)
        drawn(family, pipe, prompts, edit)
