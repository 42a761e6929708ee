"""Words of pipelines that read images with their prompts: where a run shows that they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hookctl import Branch, Editor, Maps, control
from hookctl.address.text import PromptText, TextLayout
from hookctl.errors import WordError
from hookctl.loop.prompts import EncodedTexts
from hookctl.recipes import NAG, RegionalPrompts
from hookctl.run_state import RunState
from tests import zoo
from tests.families.subjects import error
from tests.zoo.wild import WILD
from tests.zoo.wild.around import smaller

WIDE, HIGH = Image.new("RGB", (72, 56), "red"), Image.new("RGB", (56, 64), "blue")
CASES: dict[str, tuple[str, Any]] = {
    "one image": ("QwenImageEditPipeline", WIDE),
    "another image": ("QwenImageEditPipeline", HIGH),
    "an image of several": ("QwenImageEditPlusPipeline", [WIDE]),
    "two images": ("QwenImageEditPlusPipeline", [WIDE, HIGH]),
}
CASES = {name: case for name, case in CASES.items() if case[0] in WILD}
EACH = pytest.mark.parametrize("case", CASES)
PROMPT, OTHER, LONGER = "a red cat", "a red dog", "a green bird in the snow, wide"


class Look(Editor):
    """The text that the denoiser is given, its prompt read word by word, and texts of its own."""

    text: RunState[Tensor] = RunState()
    read: RunState[PromptText] = RunState()
    own: RunState[EncodedTexts] = RunState()

    def attach(self, target: Any) -> None:
        self._layout = TextLayout(target)

    def begin(self, state: Any) -> None:
        self.text = state.kwargs[state.text][0]
        self.read = self._layout.read(state.prompts[0], state.own_text)
        self.own = EncodedTexts(state, [PROMPT, LONGER])


class Wider(Look):
    """A row with a text that is longer than the prompt, before which the prompt's is padded."""

    def branches(self, state: Any) -> dict[str, Branch]:
        return {"wider": self.own.branch(LONGER)}


EDITORS: dict[str, Callable[[tuple[int, ...]], Sequence[Editor]]] = {
    "word": lambda positions: [Maps("cat", mean=True)],
    "padded": lambda positions: [Maps("cat", mean=True), Wider()],
    "tokens": lambda positions: [Maps(tokens=positions, mean=True)],
    "neighbour": lambda positions: [Maps("red", mean=True)],
}


def drawn(case: str, *editors: Editor, prompt: str = PROMPT, pipe: Any = None) -> Tensor:
    name, image = CASES[case]
    pipe = WILD[name].make() if pipe is None else pipe
    with control(pipe, *editors, strict=False), smaller(type(pipe)), torch.no_grad():
        found = pipe(
            prompt=prompt,
            image=image,
            negative_prompt="blurry",
            true_cfg_scale=2.0,
            num_inference_steps=2,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    latents: Tensor = found.images
    return latents


@EACH
def test_another_word_changes_its_tokens_and_later_ones(case: str) -> None:
    looks = [Look(), Look()]
    for look, prompt in zip(looks, (PROMPT, OTHER), strict=True):
        drawn(case, look, prompt=prompt)
    before, after = (look.text for look in looks)
    assert before.shape == after.shape == (looks[0].read.tokens, 16)
    changed = (before != after).any(1).nonzero().flatten().tolist()
    words = looks[0].read.find("cat")
    assert words == looks[1].read.find("dog")
    assert changed == list(range(words[0], len(before)))


@EACH
def test_the_tokens_are_the_processors(case: str) -> None:
    pipe, look, seen = WILD[CASES[case][0]].make(), Look(), []
    handle = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    drawn(case, look, pipe=pipe)
    handle.remove()
    [(start, tokens)] = look.read.streams
    assert start == 0
    assert list(tokens.ids) == seen[0][pipe.prompt_template_encode_start_idx :].tolist()


@EACH
def test_further_texts_are_read_with_the_images(case: str) -> None:
    look = Look()
    drawn(case, look)
    assert torch.equal(look.own.sequence(PROMPT), look.text)
    assert len(look.own.sequence(LONGER)) > len(look.text)


@EACH
def test_maps_of_a_word(case: str) -> None:
    """They are those columns; also where the prompt's text is padded beside a longer one."""
    look = Look()
    drawn(case, look)
    positions = look.read.find("cat")
    found = {}
    for name, editors in EDITORS.items():
        pipe = WILD[CASES[case][0]].make()
        with control(pipe, *editors(positions), strict=False) as session:
            drawn(case, pipe=pipe)
            found[name] = session.maps.every()[0].mean()
    assert len(positions) == 1
    assert torch.equal(found["word"], found["tokens"])
    assert error(found["padded"], found["word"]) < 1e-5
    assert error(found["neighbour"], found["word"]) > 1e-3


@EACH
def test_recipes_with_texts_of_their_own(case: str) -> None:
    plain = drawn(case)
    for edit, idle in (
        (NAG("a red dog"), NAG("a red dog", scale=1.0)),
        (
            RegionalPrompts(["a blue dog in the snow"], [(0, 0, 0.5, 1)]),
            RegionalPrompts(["a blue dog in the snow"], [(0, 0, 0.5, 1)], base=1.0),
        ),
    ):
        assert error(drawn(case, edit), plain) > 1e-5
        assert torch.equal(drawn(case, idle), plain)
    # A region that is everywhere, of the prompt's own text.
    same = RegionalPrompts([PROMPT], [(0, 0, 1, 1)], base=0.0)
    assert error(drawn(case, same), plain) < 1e-5


def test_a_word_that_is_not_there() -> None:
    with pytest.raises(WordError, match="'dog' is not in the prompt 'a red cat'"):
        drawn("one image", Maps("dog"))


@pytest.mark.skipif("qwen_image" not in zoo.PIPELINES, reason="of newer diffusers")
def test_a_prompt_that_the_template_says_too() -> None:
    """The prompt's words are those where the template is open."""
    pipe = zoo.PIPELINES["qwen_image"].make()
    whole = pipe.prompt_template_encode.format("x")
    said = whole[: whole.index("x")].split()[-1][-1]
    layout = TextLayout(pipe)
    (_, one), (_, other) = (layout.read(text).streams[0] for text in (said, "x"))
    assert (one.start, one.end) == (other.start, other.end)
