"""Edits that start from another noise than their source are warned about; others are not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import hookctl
from hookctl.errors import HookctlWarning
from hookctl.recipes import MasaCtrl, PromptToPrompt, StyleAligned
from tests.recipes.images import PROMPT, TARGET, pipeline

PROMPTS = [PROMPT, TARGET]


def said(edit: Any, **given: Any) -> list[str]:
    """The warnings of a run of one step."""
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings(record=True) as found, hookctl.control(pipe, edit):
        warnings.simplefilter("always")
        pipe(PROMPTS, num_inference_steps=1, output_type="latent", **given)
    return [str(w.message) for w in found if issubclass(w.category, HookctlWarning)]


@pytest.mark.parametrize("recipe", [PromptToPrompt, MasaCtrl])
@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)])
def test_one_generator_for_two_prompts(recipe: Any, generator: Any) -> None:
    found = [text for text in said(recipe(PROMPTS), generator=generator) if "noise" in text]
    assert len(found) == 1 and "generator=edit.generators(seed=0)" in found[0]
    assert f"{recipe.__name__}: prompt 1 starts from another noise than prompt 0" in found[0]


@pytest.mark.parametrize("recipe", [PromptToPrompt, MasaCtrl])
@pytest.mark.parametrize("images", [1, 2])
def test_a_generator_for_each_image(recipe: Any, images: int) -> None:
    edit = recipe(PROMPTS)
    given = edit.generators(seed=0, images=images)
    found = said(edit, generator=given, num_images_per_prompt=images)
    assert not [text for text in found if "noise" in text]


def test_a_set_in_one_style_has_noises_of_its_own() -> None:
    edit = StyleAligned(PROMPTS)
    found = said(edit, generator=edit.generators(seed=0))
    assert not [text for text in found if "noise" in text]
