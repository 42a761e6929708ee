"""Words on whole pipelines: stretches of the text, and the text as the pipeline encodes it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
import torch

from hookctl import Maps, Session, control
from hookctl.address import text as text_module
from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.families.text import kandinsky6
from hookctl.address.latent import finest_within
from hookctl.address.text import Prompt, PromptText, TextLayout, align, prompts_given
from hookctl.address.words import PromptTokens
from hookctl.errors import AlignmentError, HookctlWarning, InputError, UnsupportedError, WordError
from hookctl.recipes import PromptToPrompt
from tests import zoo
from tests.families.subjects import Idle
from tests.zoo.wild import WILD

CAT, SQUIRREL = "a red cat", "a red squirrel"


def read(family: str, prompt: str, tokens: int | None = None) -> PromptText:
    return TextLayout(zoo.PIPELINES[family].make()).read(prompt, tokens)


@pytest.mark.parametrize("family", [name for name in zoo.PIPELINES if name != "svd"])
def test_tokenizers_stay_as_they_are(family: str) -> None:
    """A fast one keeps how it pads: changed by us, it would spoil what another thread encodes."""
    pipe = zoo.PIPELINES[family].make()
    held = [x for x in pipe.components.values() if getattr(x, "is_fast", False)]
    for tokenizer in held:
        tokenizer._tokenizer.enable_padding(length=13)
        tokenizer._tokenizer.enable_truncation(11)
    before = [(x._tokenizer.padding, x._tokenizer.truncation) for x in held]
    assert held and TextLayout(pipe).read(CAT).words == 3
    with control(pipe, Maps("cat")):
        pass
    assert [(x._tokenizer.padding, x._tokenizer.truncation) for x in held] == before


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


def test_a_pipeline_that_cleans_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """PixArt does by default, where two packages are installed; what it leaves is what it sees."""
    pipe = zoo.PIPELINES["pixart"].make()

    def cleaned(self: Any, text: str, clean_caption: bool = False) -> list[str]:
        return [text.replace("#12345 ", "") if clean_caption else text]

    monkeypatch.setattr(type(pipe), "_text_preprocessing", cleaned)
    prompt, layout = "a #12345 cat", TextLayout(pipe)
    whole, left = (
        PromptTokens.encode(text, pipe.tokenizer).find("cat") for text in (prompt, "a cat")
    )
    assert whole != left
    monkeypatch.setattr(text_module, "find_spec", lambda name: None)
    assert layout.read(prompt).find("cat") == whole
    monkeypatch.setattr(text_module, "find_spec", lambda name: name)
    assert layout.read(prompt).find("cat") == left
    prompts_given(pipe, {"prompt": prompt, "clean_caption": False})
    assert layout.read(prompt).find("cat") == whole
    with ThreadPoolExecutor(1) as other:  # whose calls have settings of their own
        assert other.submit(layout.read, prompt).result().find("cat") == left


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


# -- encoders with texts of their own --------------------------------------------------------------


class Words(Maps):
    """Maps, and which token positions they were read from."""

    read: list[tuple[int, ...]]

    def begin(self, state: Any) -> None:
        super().begin(state)
        self.read = []

    def attention(self, call: Any) -> None:
        super().attention(call)
        self.read += [tokens for found in self._found.values() for _, tokens in found]


def drawn(family: str, *editors: Any, prompts: Any, **texts: Any) -> Session:
    case = zoo.PIPELINES[family]
    pipe = case.make()
    with control(pipe, *editors) as session:
        case.run(pipe, prompts, steps=1, **texts)
    return session


def test_a_text_for_t5_alone() -> None:
    """SD3: each stretch is read in its own text."""
    prompt = Prompt({"prompt": CAT, "prompt_2": CAT, "prompt_3": "a blue dog and a cat"})
    text, start = read("sd3", prompt, 77 + 16), 77
    assert text.find("red") == (2,)
    assert text.find("dog") == (start + 2,)
    assert text.find("cat") == (3, start + 5)
    with pytest.raises(WordError, match="squirrel"):
        text.find("squirrel")


def test_the_maps_of_a_text_for_t5_alone() -> None:
    words = Words("dog")
    session = drawn("sd3", words, prompts=CAT, prompt_3="a blue dog", max_sequence_length=16)
    assert set(words.read) == {(77 + 2,)} and "dog" in session.maps
    every = Maps()
    assert {"red", "dog"} <= set(
        drawn("sd3", every, prompts=CAT, prompt_3="a blue dog", max_sequence_length=16).maps.words
    )


def test_flux_shows_its_attention_the_second_text() -> None:
    words = Words("dog")
    drawn("flux", words, prompts=CAT, prompt_2="a blue dog", max_sequence_length=16)
    assert set(words.read) == {(2,)}
    with pytest.raises(WordError, match="'cat' is not in the prompt 'a blue dog'"):
        drawn("flux", Maps("cat"), prompts=CAT, prompt_2="a blue dog", max_sequence_length=16)
    edit = PromptToPrompt(["a red dog", "a blue dog"])
    case = zoo.PIPELINES["flux"]
    with control(pipe := case.make(), edit):
        case.run(pipe, [CAT, CAT], steps=1, prompt_2=edit.prompts, max_sequence_length=16)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_encoders_that_share_positions(family: str) -> None:
    """A position holds a word of both texts: refused where they differ, before any denoising."""
    idle = Idle()
    with pytest.raises(InputError, match="prompt_2='a blue dog'.*leave prompt_2 out"):
        drawn(family, idle, Maps("cat"), prompts=CAT, prompt_2="a blue dog")
    assert not idle.calls
    drawn(family, Maps("cat"), prompts=CAT, prompt_2=CAT)
    drawn(family, Idle(), prompts=CAT, prompt_2="a blue dog")  # no word is asked for


def test_an_edit_of_texts_that_differ() -> None:
    edit = PromptToPrompt([CAT, "a red dog"])
    with pytest.raises(InputError, match="called with .*prompt_2='a blue dog'"):
        drawn("sdxl", edit, prompts=edit.prompts, prompt_2=["a blue dog", "a dog"])


def test_a_prompt_of_several_texts() -> None:
    pipe = zoo.PIPELINES["sdxl"].make()
    [one] = prompts_given(pipe, {"prompt": CAT, "prompt_2": SQUIRREL})
    assert isinstance(one, Prompt) and str(one) == CAT and one != CAT and CAT != one
    [again] = prompts_given(pipe, {"prompt": [CAT], "prompt_2": [SQUIRREL]})
    assert one == again and hash(one) == hash(again)
    assert repr(one) == f"(prompt={CAT!r}, prompt_2={SQUIRREL!r})"
    assert prompts_given(pipe, {"prompt": CAT, "prompt_2": None}) == (CAT,)
    assert prompts_given(pipe, {"prompt": [CAT, SQUIRREL]}) == (CAT, SQUIRREL)
    assert prompts_given(pipe, {"prompt_embeds": torch.zeros(1)}) == ()


# -- prompts inside a template ---------------------------------------------------------------------

CHATS = [case.name for case in zoo.CHATS]


@pytest.mark.parametrize("family", ["sd15", *CHATS])
def test_a_word_is_where_the_text_begins_to_differ(family: str) -> None:
    """These encoders look back only: another word changes their states from its place on."""
    case = zoo.PIPELINES[family]
    pipe = case.make()
    states = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        states.append(text[-1] if family == "sd15" else text[0])

    handle = case.denoiser_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    for prompt in ("a squirrel above a cat", "a squirrel above a dog"):
        case.run(pipe, prompt, steps=1, guidance=1.0)
    handle.remove()
    differing = (states[0] != states[1]).any(-1).nonzero().flatten()
    text = TextLayout(pipe).read("a squirrel above a cat")
    assert text.find("cat") == (int(differing[0]),)
    assert len(text.find("squirrel")) > 1
    assert text.words == 5


@pytest.mark.parametrize("family", CHATS)
def test_an_edit_of_a_word_in_a_template(family: str) -> None:
    """The map of a word is there, and a weight on it changes the image that it is in alone."""
    case = zoo.PIPELINES[family]
    pipe = case.make()
    edit = PromptToPrompt(["a red cat", "a red cat"], reweight={"cat": 4.0}, self_replace=0.0)
    plain = case.run(pipe, list(edit.prompts))
    with control(pipe, edit, Maps("cat", sites="joint")) as session:
        edited = case.run(pipe, list(edit.prompts))
    assert torch.equal(edited[0], plain[0]) and not torch.equal(edited[1], plain[1])
    assert session.maps["cat"].mean().shape[-2:] == (8, 8)


def test_a_word_that_the_template_has_too() -> None:
    pipe = WILD["Kandinsky6TI2VAPipeline"].make()
    [stream] = kandinsky6(pipe)
    assert stream.wrap is not None
    before = stream.wrap("video").rindex("video")  # of the characters: "Describe the video ..."
    first = len(stream.tokenizer(stream.wrap("video")[:before]).input_ids) - stream.dropped
    assert TextLayout(pipe).read("video", 352).find("video")[0] == first > 300


def test_a_template_that_is_not_known() -> None:
    class OddPipeline:
        tokenizer = zoo.PIPELINES["sd15"].make().tokenizer

        def encode_prompt(self, prompt: str) -> Any:
            return self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])

    with pytest.raises(
        UnsupportedError, match="OddPipeline.*no pipeline that hookctl knows.*positions of tokens"
    ):
        TextLayout(OddPipeline())


LONG = " ".join(["a red cat,"] * 40 + ["a dog"])


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "flux"])
def test_what_does_not_fit_is_cut_as_the_pipeline_cuts_it(family: str) -> None:
    pipe = zoo.PIPELINES[family].make()
    layout = TextLayout(pipe)
    with pytest.warns(HookctlWarning, match="does not see '.*a dog'; shorten the prompt"):
        text = layout.read(LONG, None if family == "sd15" else 77)
    (start, read), *_ = text.streams
    tokenizer = pipe.tokenizer_2 if family == "flux" else pipe.tokenizer
    cut = tokenizer(LONG, padding="max_length", max_length=read.length, truncation=True)
    assert (start, list(read.ids)) == (0, cut.input_ids) and read.length == 77
    assert read.cut is not None and text.words == len(read.words) < len(LONG.split())
    assert text.find("cat")
    with pytest.raises(WordError, match="'dog' does not fit into the 77 tokens .* end with '"):
        text.find("dog")


def test_a_length_that_no_text_has_is_not_cut_to() -> None:
    """A family of which it is not known how its text gets so short."""
    with pytest.raises(InputError, match="at most 4 fit"):
        TextLayout(zoo.PIPELINES["sd15"].make()).read("a red cat above a dog", 4)


def test_a_tokenizer_that_takes_more_than_a_table_can_hold() -> None:
    """Tables of 131072 x 131072 tokens would take 137 GB."""
    pipe = zoo.PIPELINES["sd15"].make()
    pipe.tokenizer.model_max_length = 131072
    edits = ["a red cat", "a red dog", "a big red dog"]
    with control(pipe, PromptToPrompt(edits)):
        pass
    assert TextLayout(pipe).read("a red cat").tokens < 10
