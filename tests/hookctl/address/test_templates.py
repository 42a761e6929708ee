"""Words of prompts inside a template: where a live pipeline's text follows them, and nothing else.

With the attention of the text encoder silenced, the positions that follow another word are the
word's (`families.prove`).
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from hookctl import Maps, control
from hookctl.address.families.prove import prove
from hookctl.address.families.traces import PROMPTS, Drawn
from hookctl.address.text import TextLayout
from hookctl.errors import HookctlWarning, WordError
from hookctl.inspect.proved import proved
from hookctl.recipes import PromptToPrompt
from hookctl.recipes.common.prompt_texts import PromptTexts
from tests.families.subjects import Idle
from tests.families.wild import WORD_FACT
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
    asked = Drawn(prompts=edit.prompts, seeds=(0, 0))
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
    asked = Drawn(prompts=[CAT, "a red dog"], seeds=(0, 0))
    alone = []
    for template in (SAY, longer):
        edit = PromptToPrompt(asked.prompts, reweight={"dog": 4.0}, self_replace=0.0)
        with control(pipe, edit):
            alone.append(hunyuan(pipe, asked, prompt_template=template))
    edit = PromptToPrompt(asked.prompts, reweight={"dog": 4.0}, self_replace=0.0)
    with control(pipe, edit):
        for template, wanted in zip((SAY, longer), alone, strict=True):
            assert torch.equal(hunyuan(pipe, asked, prompt_template=template), wanted)


def test_what_a_call_said_holds_in_its_own_thread() -> None:
    """And beside those of other pipelines, which one run may call in the middle of another's."""
    pipe, other = WILD["HunyuanVideoPipeline"].make(), WILD["HunyuanVideoPipeline"].make()
    with control(pipe, Idle()), control(other, Idle()):
        hunyuan(pipe, Drawn())
        hunyuan(other, Drawn(), prompt_template={"template": "look: {}", "crop_start": 0})
    here = [TextLayout(one).read(CAT, 24).find("cat") for one in (pipe, other)]
    assert here[0] != here[1] and TextLayout(pipe).form
    elsewhere: list[str] = []
    thread = threading.Thread(target=lambda: elsewhere.append(TextLayout(pipe).form))
    thread.start()
    thread.join()
    assert elsewhere == [""]


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


# -- other families --------------------------------------------------------------------------------


def counted(pipe: Any, text: str) -> int:
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    return len(tokenizer(text).input_ids)


def fit_krea2(pipe: Any) -> None:
    before, behind = pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix
    pipe.prompt_template_encode_start_idx = counted(pipe, before)
    pipe.prompt_template_encode_num_suffix_tokens = counted(pipe, behind)


def fit_kandinsky5(pipe: Any) -> None:
    before = pipe.prompt_template.partition("{}")[0]
    pipe.prompt_template_encode_start_idx = counted(pipe, before)


def begins(pipe: Any) -> None:
    """FLUX.2's template begins with a token that its tokenizer adds of itself, but for once."""
    tokenizer = pipe.tokenizer.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    number = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", number)]
    )
    template = "{{ bos_token }}" + (pipe.tokenizer.chat_template or tokenizer.chat_template)
    pipe.tokenizer.chat_template = tokenizer.chat_template = template
    pipe.text_encoder.resize_token_embeddings(len(tokenizer))


def fit_ovis(pipe: Any) -> None:
    pipe.user_prompt_begin_id = counted(pipe, pipe.system_prompt)


LINES = {"complex_human_instruction": ["Say more of the cat.", "User Prompt: "]}
# Name -> what its call is given, and what is to be made to fit: the published numbers are those of
# the published tokenizers.
TEMPLATED: dict[str, tuple[dict[str, Any], Any]] = {
    "SanaPipeline": (LINES, None),
    "SanaControlNetPipeline": (LINES, None),
    "SanaPAGPipeline": (LINES, None),
    "SanaSprintPipeline": (LINES, None),
    "SanaVideoPipeline": (LINES, None),
    "SanaImageToVideoPipeline": (LINES, None),
    "Lumina2Pipeline": ({"system_prompt": "say it: a cat"}, None),
    "Krea2Pipeline": ({"max_sequence_length": 40}, fit_krea2),
    "Kandinsky5T2VPipeline": ({"max_sequence_length": 64}, fit_kandinsky5),
    "Kandinsky5T2IPipeline": ({"max_sequence_length": 64}, fit_kandinsky5),
    "Kandinsky5I2VPipeline": ({"max_sequence_length": 64}, fit_kandinsky5),
    "OvisImagePipeline": ({"max_sequence_length": 128}, fit_ovis),
    "EasyAnimatePipeline": ({}, None),
    "Cosmos2_5_PredictBasePipeline": ({"max_sequence_length": 256}, None),
    "MotifVideoPipeline": ({}, None),
}
SLOW = {"Kandinsky5T2IPipeline", "SanaSprintPipeline", "SanaPipeline", "Kandinsky5I2VPipeline"}


@pytest.mark.skipif("Flux2Pipeline" not in WILD, reason="this diffusers lacks FLUX.2")
@pytest.mark.parametrize("beginning", [False, True])
def test_a_template_that_begins_with_a_token(beginning: bool) -> None:
    proved_words("Flux2Pipeline", {"max_sequence_length": 400}, begins if beginning else None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in SLOW else ())
        for name in TEMPLATED
        if name in WILD
    ],
)
def test_the_templates_of_other_families(name: str) -> None:
    proved_words(name, *TEMPLATED[name])


def proved_words(name: str, more: dict[str, Any], fit: Any) -> None:
    case = WILD[name]
    pipe = case.make()
    if fit is not None:
        fit(pipe)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # tokens that were added to a tiny encoder are all alike to it
        pipe.text_encoder.get_input_embeddings().weight.normal_()
    call = pipe.__class__.__call__

    class Given(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return call(self, *args, **kwargs | more)

    Given.__call__.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    pipe.__class__ = Given
    facts = proved(pipe, lambda d: case.draw(pipe, d.prompts, d.negatives, d.seeds)).facts
    [word] = [fact for fact in facts if fact.what == WORD_FACT]
    assert word.agrees, word
