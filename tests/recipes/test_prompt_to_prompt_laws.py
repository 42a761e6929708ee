"""What must hold of Prompt-to-Prompt on every family, whatever the numbers."""

from __future__ import annotations

import pytest
import torch

import hookctl
from hookctl import control
from hookctl.recipes import PromptToPrompt
from tests import zoo
from tests.recipes.runs import draw, made, plain, relative

CAT = "a red cat above a blue square"
DOG = "a red dog above a blue square"
BIRD = "a green bird above a blue square"
LONGER = "a photo of a red cat above a green square"
FAMILIES = ["sd15", "sdxl", "sd3", "flux", "pixart", "animatediff", "wan"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_strength_is_no_edit_bit_for_bit(family: str) -> None:
    before = plain(family, PromptToPrompt([CAT, DOG]))
    for options in ({}, {"reweight": {"dog": 3.0}}):
        edit = PromptToPrompt([CAT, DOG], cross_replace=0.0, self_replace=0.0, **options)
        assert torch.equal(draw(family, edit), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_prompt_gives_the_same_image(family: str) -> None:
    edit = PromptToPrompt([CAT, CAT], blend="cat")
    source, edited = draw(family, edit, steps=3)
    assert relative(edited, source) < 1e-5  # float32
    assert relative(source, plain(family, edit, steps=3)[0]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_edits_change(family: str) -> None:
    edit = PromptToPrompt([CAT, DOG], reweight={"dog": 2.0})
    result, before = draw(family, edit, steps=3), plain(family, edit, steps=3)
    assert relative(result[0], before[0]) < 1e-5  # float32
    assert relative(result[1], before[1]) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_the_mask_the_edit_is_the_source(family: str) -> None:
    """Bit for bit, for every latent: square, packed, with frames."""
    edit = PromptToPrompt([CAT, BIRD], blend=["cat", "bird"], blend_threshold=0.9)
    source, edited = draw(family, edit, steps=3)
    assert edit.local is not None
    mask = edit.local.mask(1)
    assert mask is not None and mask.any() and not mask.all()
    if family == "flux":
        same = mask.flatten()[:, None].logical_not().expand_as(source)
    else:
        same = (mask[None] if source.dim() == 4 else mask).logical_not().expand_as(source)
    assert torch.equal(edited[same], source[same])
    assert not torch.equal(edited[~same], source[~same])


@pytest.mark.parametrize("family", ["animatediff", "wan"])
def test_every_frame_has_its_mask(family: str) -> None:
    edit = PromptToPrompt([CAT, BIRD], blend=["cat", "bird"], blend_threshold=0.9)
    draw(family, edit)
    assert edit.local is not None
    mask = edit.local.mask(1)
    assert mask is not None and mask.shape[0] == 3
    assert any(not torch.equal(mask[0], frame) for frame in mask[1:])


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "pixart"])
def test_several_images_of_each_prompt(family: str) -> None:
    """Image j of an edit answers to image j of the source."""
    options = {"blend": ["cat", "dog"], "blend_threshold": 0.9}
    edit = PromptToPrompt([CAT, DOG], **options)
    both = draw(family, edit, n=2, generator=edit.generators(seed=0, images=2))
    for j in range(2):
        alone = draw(family, edit, generator=edit.generators(seed=j))
        assert relative(both[[j, 2 + j]], alone) < 1e-5  # float32, another batch


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_several_edits_of_one_source(family: str) -> None:
    """In one batch each is what it is alone, though they are of different kinds."""
    options = {"blend_threshold": 0.9, "reweight": [{"dog": -1.0}, None, {"photo": 3.0}]}
    words = ["cat", "dog", None, ["photo", "cat"]]
    prompts = [CAT, DOG, BIRD, LONGER]
    edit = PromptToPrompt(prompts, blend=words, **options)
    together = draw(family, edit)
    for i in edit.edits:
        one = PromptToPrompt(
            [CAT, prompts[i]],
            blend=[words[0], words[i]],
            blend_threshold=0.9,
            reweight=[options["reweight"][i - 1]],
        )
        assert relative(together[[0, i]], draw(family, one)) < 1e-5  # float32, another batch


@pytest.mark.parametrize("gain", [3.0, 0.0, -2.0])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_reweighting_scales_the_word_exactly(family: str, gain: float) -> None:
    """In its window a word's map is `gain` times the source's, and the others' are the source's."""
    edit = PromptToPrompt([CAT, CAT], reweight={"cat": gain}, cross_replace=0.5)
    with control(made(family), edit, hookctl.Maps("cat", "red")) as session:
        call = {"steps": 4, "generator": edit.generators()}
        zoo.PIPELINES[family].run(made(family), edit.prompts, **call)
    steps = range(int(0.5 * 5))
    for word, scale in (("cat", gain), ("red", 1.0)):
        for path in session.maps[word].sites:
            for step in steps:
                one = session.maps[word].where(site=path, steps=[step])
                source, edited = (one.where(prompt=i).records[0].map for i in (0, 1))
                assert source.mean() > 0
                torch.testing.assert_close(edited, scale * source, rtol=1e-5, atol=1e-7)
    late = session.maps["cat"].where(steps=[3])
    source, edited = (late.where(prompt=i).records[0].map for i in (0, 1))
    assert abs(edited.mean() / source.mean() - gain) > 0.1


def test_maps_see_the_edited_attention_and_blend_shares_them() -> None:
    edit = PromptToPrompt([CAT, DOG], blend=["cat", "dog"])
    with control(made("sd15"), edit) as session:
        zoo.PIPELINES["sd15"].run(made("sd15"), edit.prompts, generator=edit.generators())
    source = session.maps["cat"].where(prompt=0, steps=[0]).mean()
    edited = session.maps["dog"].where(prompt=1, steps=[0]).mean()
    torch.testing.assert_close(edited, source)  # replaced: the dog is where the cat was


def test_conditional_rows_alone_are_edited() -> None:
    """The report of what was touched, and perturbed rows along with their prompt's."""
    edit = PromptToPrompt([CAT, DOG])
    seen: list[tuple[str, int, str, int]] = []

    class Spy(hookctl.Editor):
        def attention(self, call: hookctl.AttentionCall) -> None:
            seen.extend(
                (row.branch, row.prompt, source.branch, source.prompt)
                for row, source in edit.edited(call)
            )

    pipe = zoo.PIPELINES["sd15_pag"].make()
    with control(pipe, edit, Spy()):
        zoo.PIPELINES["sd15_pag"].run(pipe, edit.prompts, generator=edit.generators())
    assert set(seen) == {("cond", 1, "cond", 0), ("perturbed", 1, "perturbed", 0)}


@pytest.mark.slow
def test_run_draws_everything() -> None:
    edit = PromptToPrompt([CAT, DOG])
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    result = edit.run(made("sd15"), hookctl.Maps("dog"), seed=0, images=2, **call)
    expected = draw("sd15", edit, n=2, generator=edit.generators(0, 2), negatives="")
    assert torch.equal(result, expected)
    assert edit.run(made("animatediff"), num_frames=3, **call).shape[0] == 2


def test_one_routing_serves_many_steps() -> None:
    made_in: list[int] = []

    class Counted(PromptToPrompt):
        def after(self, state: hookctl.State) -> None:
            super().after(state)
            made_in.append(len(self._routing.routings))

    draw("sd15", Counted([CAT, DOG], cross_replace={"default": 0.5, "dog": 0.2}), steps=10)
    assert made_in[-1] == 3


@pytest.mark.slow
def test_an_editor_serves_run_after_run() -> None:
    """Nothing of a run is left in the next: sums of maps, another length, another pipeline."""
    edit = PromptToPrompt([CAT, DOG], blend=["cat", "dog"], blend_threshold=0.9)
    first = draw("sd15", edit, steps=3)
    draw("flux", edit, steps=2)
    assert torch.equal(draw("sd15", edit, steps=3), first)
    with control(made("sd15"), edit):
        for _ in range(2):
            call = {"steps": 3, "generator": edit.generators()}
            assert torch.equal(zoo.PIPELINES["sd15"].run(made("sd15"), edit.prompts, **call), first)
