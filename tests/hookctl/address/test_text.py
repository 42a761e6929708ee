"""Words on whole pipelines: stretches of the text, and the text as the pipeline encodes it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.layout import finest_within
from hookctl.address.text import PromptText, TextLayout, align
from hookctl.errors import AlignmentError, InputError, WordError
from tests import zoo

CAT, SQUIRREL = "a red cat", "a red squirrel"


def read(family: str, prompt: str, tokens: int | None = None) -> PromptText:
    return TextLayout(zoo.PIPELINES[family].make()).read(prompt, tokens)


def test_a_word_in_every_stretch() -> None:
    """SD3: CLIP with a token before the words, then T5 without."""
    text = read("sd3", SQUIRREL, 77 + 16)
    assert text.find("squirrel") == (3, 4, 77 + 2, 77 + 3)
    assert (text.tokens, text.words) == (93, 3)
    assert text.find([1, 92]) == (1, 92)
    with pytest.raises(InputError, match="93"):
        text.find(93)
    with pytest.raises(WordError, match="dog"):
        text.find("dog")


def test_stretches_are_aligned_apart() -> None:
    texts = [read("sd3", prompt, 77 + 16) for prompt in (CAT, SQUIRREL)]
    token_map, aligned = align(*texts, "replace")
    assert aligned.all()
    assert not token_map[:77, 77:].any() and not token_map[77:, :77].any()
    assert token_map[3].nonzero().flatten().tolist() == [3, 4]
    assert token_map[79].nonzero().flatten().tolist() == [79, 80]
    assert torch.equal(token_map.sum(1), torch.ones(93, dtype=torch.float64))
    with pytest.raises(AlignmentError, match="refine"):
        align(texts[0], read("sd3", "a cat", 93), "replace")


def test_a_pipeline_that_lowers_the_case() -> None:
    """What has no upper case in its vocabulary would fall into other tokens."""
    assert read("pixart", "A RED Cat", 16).find("cat") == (2,)
    assert read("pixart", "A RED Cat", 16).text == "A RED Cat"


def test_a_textual_inversion_of_several_vectors() -> None:
    pipe: Any = zoo.PIPELINES["sd15"].make()
    pipe.load_textual_inversion(torch.zeros(3, 32), token="<thing>")
    text = TextLayout(pipe).read("a red <thing> above a cat")
    assert text.find("<thing>") == (3, 4, 5)
    assert text.find("cat") == (8,)


@pytest.mark.parametrize(
    ("family", "latent", "expected"),
    [
        ("sd15", (64, 64), Fraction(1, 4)),
        ("sd15", (16, 16), Fraction(1)),  # 16 x 16 cells are what is published
        ("sd15", (96, 64), Fraction(1, 4)),
        ("sdxl", (128, 128), Fraction(1, 4)),
        ("sdxl", (32, 32), Fraction(1, 2)),
        ("sd3", (128, 128), Fraction(1, 2)),  # one grid throughout
        ("wan", (3, 60, 104), Fraction(1, 2)),
    ],
)
def test_the_sites_that_hold_the_layout(
    family: str, latent: tuple[int, ...], expected: Fraction
) -> None:
    sites = [site for site, _ in describe_sites(denoiser_of(zoo.PIPELINES[family].make()))]
    assert finest_within(sites, latent) == expected
    assert finest_within([], latent) is None
