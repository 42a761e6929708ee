"""LEDITS++ against diffusers' own pipeline, and its laws."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
)
from torch import Tensor

from hookctl import Editor, control
from hookctl.errors import InputError
from hookctl.loop.inversion import Correction
from hookctl.recipes import EditFriendlyDDPM, LEDITSPlusPlus
from hookctl.recipes.common.implicit_masks import at_least
from hookctl.recipes.common.real_images.inverted import Inverted
from tests import zoo
from tests.recipes import runs
from tests.recipes.images import image
from tests.recipes.runs import made, relative

STEPS = 2
CAT = "a red cat"
draw, plain = partial(runs.draw, steps=STEPS), partial(runs.plain, steps=STEPS)
Edit = partial(LEDITSPlusPlus, prompts=[CAT, CAT])


# -- diffusers' pipeline -----------------------------------------------------------------------

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    ),
}
MASKS = {
    "both": {},
    "words": {"use_intersect_mask": False, "use_cross_attn_mask": True},
    "guidance": {"use_intersect_mask": False},
}
KEPT = 5  # steps, of six


class Official:
    """An image inverted by diffusers' pipeline of tiny parts, in float64."""

    def __init__(self, name: str) -> None:
        kind, config = SCHEDULERS[name]
        self.pipe = zoo.PIPELINES["sd15"].make().to(torch.float64)
        self.pipe.scheduler = kind.from_config(
            {**self.pipe.scheduler.config, **config, "timestep_spacing": "leading"}
        )
        if name == "ddim":  # it is given its timesteps as floats, by which it can't look up
            noised = self.pipe.scheduler.add_noise
            self.pipe.scheduler.add_noise = lambda x, eps, t: noised(x, eps, t.long())
        names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "feature_extractor")
        parts = {part: getattr(self.pipe, part) for part in names}
        self.theirs = LEditsPPPipelineStableDiffusion(
            **parts, safety_checker=None, requires_safety_checker=False
        )
        self.theirs.set_progress_bar_config(disable=True)
        self.processors = dict(self.pipe.unet.attn_processors)
        # Its count of an edit's tokens has the padding in it with tokenizers of transformers 5.
        encode = self.theirs.encode_prompt
        self.theirs.encode_prompt = lambda **given: (
            *encode(**given)[:2],
            torch.tensor([len(text.split()) for text in given["editing_prompt"] or ()]),
        )
        generator = torch.Generator().manual_seed(0)
        self.theirs.invert(image(), num_inversion_steps=KEPT, skip=0.2, generator=generator)

    def draw(self, texts: list[str], **given: Any) -> Tensor:
        try:
            found = self.theirs(editing_prompt=texts, output_type="latent", **given).images
        finally:
            self.pipe.unet.set_attn_processor(dict(self.processors))
        assert isinstance(found, Tensor)
        return found

    def inverted(self) -> Inverted:
        """The same image as hookctl has them."""
        times = tuple(float(t) for t in self.theirs.scheduler.timesteps)
        before = len(times) - KEPT
        noises = [Correction(noise=z) for z in self.theirs.zs]
        return Inverted(
            prompt="",
            path=(self.theirs.init_latents,) * (len(times) + 1),
            corrections=(*[Correction()] * before, *noises),
            guidance=1.0,
            edit_guidance=1.0,
            size=(128, 128),
            timesteps=times,
            start=before,
            eta=1.0,
        )


official = cache(Official)


@pytest.mark.slow
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equals_the_pipeline_of_diffusers(scheduler: str, masks: str) -> None:
    """Two edits, of which one is taken away, of one image."""
    they, texts = official(scheduler), ["red cat", "dog"]
    want = they.draw(
        texts,
        edit_guidance_scale=[5.0, 7.0],
        edit_threshold=[0.9, 0.75],
        reverse_editing_direction=[False, True],
        **MASKS[masks],
    )
    edit = LEDITSPlusPlus(texts, scale=[5.0, -7.0], threshold=[0.9, 0.75], masks=masks, paper=True)
    again, edited = they.inverted().edit(they.pipe, edit, output_type="latent")
    assert relative(edited, want[0]) < 1e-9  # float64
    assert relative(edited, again) > 1e-2


# -- laws --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "pixart", "animatediff", "wan"])
def test_on_every_family(family: str) -> None:
    """Without strength no bit changes; with it the edited moves, and the source does not."""
    before = plain(family, Edit(["blue dog"]))
    for nothing in (Edit(["blue dog"], scale=0.0), Edit(["blue dog"], start=1.0)):
        assert torch.equal(draw(family, nothing), before)
    assert Edit(["blue dog"], scale=0.0).neutral()
    after = draw(family, Edit(["blue dog"], scale=9.0))
    assert relative(after[0], before[0]) < 1e-5  # further rows beside it
    assert relative(after[1], before[1]) > 1e-4


def test_an_inverted_image_is_drawn_again_beside_its_edit() -> None:
    pipe = made("sd15")
    inverted = EditFriendlyDDPM(pipe, image(), "", steps=4, skip=0.25).run()
    again, edited = inverted.edit(pipe, LEDITSPlusPlus(["dog"]), output_type="latent")
    assert relative(again, inverted.path[-1][0]) < 1e-4
    assert relative(edited, again) > 1e-3


def test_edits_add_up_where_nothing_masks_them() -> None:
    """The first step's change is the sum of those of each edit alone."""
    base = plain("sd15", Edit(["dog"]), steps=1)[1]
    one, two, both = (
        draw("sd15", Edit(texts, masks="none"), steps=1)[1] - base
        for texts in (["dog"], ["bird"], ["dog", "bird"])
    )
    assert relative(both, one + two) < 1e-4


def test_a_region_bounds_the_first_step() -> None:
    base = plain("sd15", Edit(["dog"]), steps=1)[1]
    change = draw("sd15", Edit(["dog"], masks="none", region=(0, 0, 0.5, 1)), steps=1)[1] - base
    assert relative(change[..., 8:] + base[..., 8:], base[..., 8:]) < 1e-6
    assert change[..., :8].norm() > 1e-3


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75, 0.9])
def test_at_least_is_a_quantile(threshold: float) -> None:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(at_least(x, threshold), x >= torch.quantile(x, threshold))


def test_without_guidance_it_asks_for_the_empty_text() -> None:
    """The first step's change is that of a guided run whose negative prompt is empty."""
    call = {"steps": 1, "negatives": ""}
    edit = Edit(["dog"], paper=True)
    guided, alone = draw("sd15", edit, **call), draw("sd15", edit, guidance=1.0, **call)
    assert relative(alone[1], guided[1]) < 1e-4


def test_several_images_have_masks_of_their_own() -> None:
    edit = Edit(["dog"])
    both = draw("sd15", edit, n=2, generator=edit.generators(images=2))
    one = draw("sd15", edit, generator=edit.generators(seed=1))
    assert relative(both[1::2], one) < 1e-4


def test_guidance_by_two_calls_adds_no_empty_text() -> None:
    seen: set[str] = set()

    class Rows(Editor):
        def attention(self, call: Any) -> None:
            seen.update(row.branch for row in call.rows)

    draw("wan", Edit(["dog"], masks="none"), Rows(), steps=1)
    assert seen == {"cond", "uncond", "edit 0"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"edits": []}, "edits=.*; give one text or more"),
        ({"edits": ["dog"], "scale": [1.0, 2.0]}, "scale=.* has 2 entries for 1 edits"),
        ({"edits": ["dog"], "threshold": 1.0}, "threshold=1.0; give a number from 0 to below 1"),
        ({"edits": ["dog"], "masks": "all"}, "masks='all'; give one of both, words"),
    ],
)
def test_refused_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LEDITSPlusPlus(**given)


def test_refusals() -> None:
    with (
        pytest.raises(InputError, match="self site"),
        control(made("sd15"), Edit(["dog"], sites="self")),
    ):
        pass
