"""Regional prompts as Regional-Prompting-FLUX has them, and regions that are where words are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl.address.regions import region_of
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError, WordError
from hookctl.loop.prompts import encode
from hookctl.recipes import MaskedSelfAttention, RegionalPrompts
from hookctl.recipes.common.live_regions import WordRegion, place_of
from tests import zoo
from tests.recipes.literal_regional import Told, attention
from tests.zoo.edits import EDITS

BASE, TEXTS = "a red cat above a blue square", ["a dog", "a red cat"]
REGIONS = [(0, 0, 0.6, 0.7), (0.3, 0.2, 0.9, 1)]  # they overlap, and leave places out


def of_embeddings(name: str, pipe: Any) -> Any:
    """A run of given embeddings, unguided."""
    common: dict[str, Any] = {
        "num_inference_steps": 2, "height": 128, "width": 128, "output_type": "latent",
        "return_dict": False,
    }  # fmt: skip
    if name == "flux":
        common |= {"pooled_prompt_embeds": encode(pipe, [BASE]).pooled, "guidance_scale": 3.5}
    else:
        common |= {"guidance_scale": 1.0, "text_encoder_out_layers": (1, 2, 3)}

    def run(sequence: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        found: Tensor = pipe(prompt_embeds=sequence, generator=generator, **common)[0]
        return found

    return run


@pytest.mark.parametrize("base", [0.0, 0.3])
@pytest.mark.parametrize("name", [n for n in ("flux", "flux2_klein") if n in zoo.PIPELINES])
def test_the_official_code(name: str, base: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = zoo.PIPELINES[name].make()
    if name == "flux":
        own, *texts = (encode(pipe, [t]).sequence for t in (BASE, *TEXTS))
    else:
        like = {"max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)}
        own, *texts = (encode(pipe, [t], like).sequence for t in (BASE, *TEXTS))
        ids = type(pipe)._prepare_text_ids  # a further text is numbered as in a run of its own

        def numbered(x: Tensor) -> Tensor:
            return torch.cat([ids(part) for part in x.split(own.shape[1], 1)], 1)

    run = of_embeddings(name, pipe)
    masks = [region_of(region).tokens(8, 8) for region in REGIONS]
    tokens = [text.shape[1] for text in texts]
    plain = run(own)
    with Told(pipe.transformer, attention(own.shape[1], masks, tokens, base)):
        if name != "flux":
            monkeypatch.setattr(type(pipe), "_prepare_text_ids", staticmethod(numbered))
        wanted = run(torch.cat([own, *texts], 1))
        monkeypatch.undo()
    edit = RegionalPrompts([text[0] for text in texts], REGIONS, base=base, paper=True)
    with hookctl.control(pipe, edit) as session:
        found = run(own)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (plain - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert "matrix" not in session.report()


@pytest.mark.parametrize("name", [n for n in ("sd3", "qwen_image") if n in zoo.PIPELINES])
def test_it_acts_where_text_and_image_are_one(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, [BASE])
    for base in (1.0, 0.2):
        with hookctl.control(pipe, RegionalPrompts(TEXTS, REGIONS, base=base, paper=True)):
            found = case.run(pipe, [BASE])
        assert torch.equal(found, plain) == (base == 1)
    with hookctl.control(pipe, RegionalPrompts(TEXTS, REGIONS)):
        assert (case.run(pipe, [BASE]) - found).abs().max() > 1e-4  # other than by default


def test_one_text_everywhere_is_a_run_of_it() -> None:
    case = zoo.PIPELINES["qwen_image"]
    pipe = case.make()
    wanted = case.run(pipe, TEXTS[:1])
    with hookctl.control(pipe, RegionalPrompts(TEXTS[:1], [(0, 0, 1, 1)], base=0.0, paper=True)):
        found = case.run(pipe, [BASE])
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_regions_beside_masked_attention() -> None:
    """What another editor hides among image tokens is hidden inside regions as well."""
    case = zoo.PIPELINES["flux"]
    pipe = case.make()
    halves = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    everywhere = RegionalPrompts([BASE], [(0, 0, 1, 1)], base=0.0)
    with hookctl.control(pipe, MaskedSelfAttention(halves)):
        wanted = case.run(pipe, [BASE])
    for edit in (everywhere, RegionalPrompts([BASE], [(0, 0, 1, 1)], base=0.0, paper=True)):
        with hookctl.control(pipe, MaskedSelfAttention(halves), edit):
            found = case.run(pipe, [BASE])
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


# -- regions that are where words are --------------------------------------------------------------


class Spy(hookctl.Editor):
    """The divisions of every call, by step."""

    sites = "cross, joint"

    def __init__(self, edit: RegionalPrompts) -> None:
        self.edit, self.seen = edit, dict[int, list[Any]]()

    def attention(self, call: AttentionCall) -> None:
        self.seen.setdefault(call.clock.step, []).extend(
            o for o in call.operations if o.verb.startswith("divide")
        )


@pytest.mark.parametrize("paper", [False, True])
def test_a_word_s_region_is_where_its_map_is(paper: bool) -> None:
    case = zoo.PIPELINES["flux"]
    pipe = case.make()
    with hookctl.control(pipe, hookctl.Maps("cat", mean=False)) as session:
        plain = case.run(pipe, [BASE], steps=4)
    maps = session.maps["cat"]
    total = torch.stack([r.map[0] for r in maps.where(steps=[0]).records]).sum(0)
    scaled = (total - total.min()) / (total.max() - total.min())
    edit = RegionalPrompts(["a dog"], ["word:cat@0.6"], base=0.2, paper=paper)
    spy = Spy(edit)
    with hookctl.control(pipe, edit, spy, hookctl.Maps("cat", mean=False)) as session:
        found = case.run(pipe, [BASE], steps=4)
    assert not spy.seen[0] and spy.seen[1]  # nothing is known in the first step
    assert (found - plain).abs().max() > 1e-4
    assert torch.equal(session.maps["cat"].where(steps=[0]).mean(), maps.where(steps=[0]).mean())
    # In the second it is where the first's map was: what of the own text is left there tells.
    mask = (scaled >= 0.6).flatten()
    fixed = RegionalPrompts(
        ["a dog"], [(scaled >= 0.6)], base=0.2, paper=paper, start=0.25, stop=0.5
    )
    live = RegionalPrompts(["a dog"], ["word:cat@0.6"], base=0.2, paper=paper, stop=0.5)
    drawn = []
    for one in (fixed, live):
        with hookctl.control(pipe, one):
            drawn.append(case.run(pipe, [BASE], steps=4))
    assert 0 < mask.sum() < 64
    assert (drawn[0] - drawn[1]).abs().max() < 1e-5


def test_maps_are_those_of_the_text_beside_regions() -> None:
    """What regions take from the text does not shrink a word's map, and so its region."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    live = RegionalPrompts(["a dog"], ["word:cat@0.5"], base=0.05)
    with hookctl.control(pipe, live):
        found = case.run(pipe, [BASE, BASE], steps=4)
    assert found.isfinite().all()


def test_a_reference_s_region() -> None:
    model = EDITS["kontext"]
    pipe = model.make()
    plain = model.draw(pipe)
    with hookctl.control(pipe, RegionalPrompts(["a dog"], ["word:references[0]@0.5"])):
        assert (model.draw(pipe) - plain).abs().max() > 1e-5
    with hookctl.control(pipe, RegionalPrompts(["a dog"], ["word:references[1]"])):
        with pytest.raises(InputError, match="sees 1 reference image"):
            model.draw(pipe)


@pytest.mark.parametrize(
    ("regions", "more", "text"),
    [
        (["word:"], {}, "a word of the prompt"),
        (["word:cat@2"], {}, "a word of the prompt"),
        (["word:cat@x"], {}, "a word of the prompt"),
        (["word:cat"], {"base": 0.0}, "base above 0"),
        ([(0, 0, 1, 1)], {"paper": True, "edge": 0.1}, "paper=True with edge"),
        ([(0, 0, 1, 1)], {"paper": True, "weights": [2]}, "paper=True with edge or weights"),
    ],
)
def test_bad_arguments(regions: Any, more: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        RegionalPrompts(["a dog"], regions, **more)


def test_refused_before_anything_is_drawn() -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    with pytest.raises(UnsupportedError, match="leave paper out"):
        hookctl.control(pipe, RegionalPrompts(["a dog"], [(0, 0, 1, 1)], paper=True)).__enter__()
    with hookctl.control(pipe, RegionalPrompts(["a dog"], ["word:horse"])):
        with pytest.raises(WordError, match="'horse' is not in the prompt"):
            zoo.PIPELINES["sd15"].run(pipe, [BASE])


def test_how_it_is_written() -> None:
    assert place_of("word: red cat @0.25", "regions") == WordRegion("red cat", 0.25)
    assert place_of("word:cat", "regions") == WordRegion("cat")
