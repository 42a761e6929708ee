"""Words of prompts inside a template: where a live pipeline's text follows them, and nothing else.

With the attention of the text encoder silenced, the positions that follow another word are the
word's (`families.prove`).
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor

from hookctl import Maps, control
from hookctl.address.families.prove import prove
from hookctl.address.families.traces import PROMPTS, Drawn
from hookctl.address.text import TextLayout
from hookctl.errors import HookctlWarning, WordError
from hookctl.recipes import PromptToPrompt
from hookctl.recipes.common.prompt_texts import PromptTexts
from tests.families.subjects import Idle
from tests.zoo.wild import WILD

CAT, DOG = PROMPTS
SAY = {"template": "say {} now", "crop_start": 1}
_DEFAULT = inspect.signature(HunyuanVideoPipeline.__call__).parameters["prompt_template"].default
# What a tiny tokenizer makes of the published template is longer than what is cut off.
PUBLISHED: dict[str, Any] = {"max_sequence_length": 400, "prompt_template": _DEFAULT}


def hunyuan(pipe: Any, asked: Drawn, **more: Any) -> Tensor:
    latents: Tensor = pipe(
        prompt=list(asked.prompts),
        num_inference_steps=1,
        height=16,
        width=16,
        num_frames=9,
        generator=[torch.Generator().manual_seed(seed) for seed in asked.seeds],
        output_type="latent",
        return_dict=False,
        **{"prompt_template": SAY, "max_sequence_length": 24, **more},
    )[0]
    return latents


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, id="cut"),
        pytest.param({"prompt_template": {"template": "{}", "crop_start": 0}}, id="bare"),
        pytest.param({"prompt_template": {"template": "the red cat: {}"}}, id="measured"),
        pytest.param(
            {"prompt_template": {"template": "a red cat says {}", "crop_start": 2}}, id="same words"
        ),
        pytest.param(PUBLISHED, id="published"),
    ],
)
def test_the_template_of_a_call(given: dict[str, Any]) -> None:
    """HunyuanVideo: an argument says what the prompt stands in, and what of that is cut off."""
    pipe = WILD["HunyuanVideoPipeline"].make()
    pipe.tokenizer.model_max_length = 10**30  # what is measured is padded to the maximum

    def run(asked: Drawn) -> Tensor:
        return hunyuan(pipe, asked, **given)

    shown = prove(pipe, run)
    with control(pipe, Idle()):
        run(Drawn())
    tokens = given.get("max_sequence_length", 24)
    assert shown.word and TextLayout(pipe).read(CAT, tokens).find("cat") == shown.word


def test_the_template_of_the_next_call() -> None:
    """What is cut off may change from call to call, and with it where words are."""
    pipe = WILD["HunyuanVideoPipeline"].make()
    texts, found = PromptTexts(pipe, [CAT, DOG]), []
    edit = PromptToPrompt([CAT, "a red dog"], reweight={"dog": 4.0}, self_replace=0.0)
    asked = Drawn(prompts=edit.prompts)
    longer = {"template": "this is what is to be seen here: {}", "crop_start": 2}
    for template in (SAY, longer, SAY):
        with control(pipe, edit, Maps("dog", sites="joint")) as session:
            drawn = hunyuan(pipe, asked, prompt_template=template)
        assert "dog" in session.maps
        found.append((texts.read(24)[0].find("cat"), drawn))
    assert found[0][0] == found[2][0] != found[1][0]
    assert torch.equal(found[0][1], found[2][1])


def test_one_session_over_calls_of_several_templates() -> None:
    pipe = WILD["HunyuanVideoPipeline"].make()
    longer = {"template": "this is what is to be seen here: {}", "crop_start": 2}
    asked = Drawn(prompts=[CAT, "a red dog"])
    alone = []
    for template in (SAY, longer):
        edit = PromptToPrompt(asked.prompts, reweight={"dog": 4.0}, self_replace=0.0)
        with control(pipe, edit):
            alone.append(hunyuan(pipe, asked, prompt_template=template))
    edit = PromptToPrompt(asked.prompts, reweight={"dog": 4.0}, self_replace=0.0)
    with control(pipe, edit):
        for template, wanted in zip((SAY, longer), alone, strict=True):
            assert torch.equal(hunyuan(pipe, asked, prompt_template=template), wanted)


def test_what_does_not_fit_behind_a_template_is_cut() -> None:
    pipe = WILD["HunyuanVideoPipeline"].make()
    with control(pipe, Idle()):
        hunyuan(pipe, Drawn(), prompt_template={"template": "say {}", "crop_start": 2})
    long = " ".join(["a red cat,"] * 10 + ["a dog"])
    with pytest.warns(HookctlWarning, match="does not see '.*a dog'; shorten the prompt"):
        text = TextLayout(pipe).read(long, 24)
    [(start, read)] = text.streams
    cut = pipe.tokenizer(f"say {long}", padding="max_length", max_length=26, truncation=True)
    assert (start, list(read.ids)) == (0, cut.input_ids[2:]) and text.find("cat")
    with pytest.raises(WordError, match="'dog' does not fit into the 24 tokens"):
        text.find("dog")
