"""Real images inverted on every family, and edits on top of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from hookctl import AttentionCall, Editor, control
from hookctl.address import families
from hookctl.errors import UnsupportedError
from hookctl.recipes import (
    DDIMInversion,
    DirectInversion,
    EditFriendlyDDPM,
    NegativePromptInversion,
    NullTextInversion,
    PromptToPrompt,
)
from hookctl.recipes.common.real_images.inverted import Inverted
from tests.hookctl.loop.families import BY_NAME, FAMILIES, Family
from tests.zoo.wild.around import smaller

PROMPT, TARGET = "a red cat", "a blue dog"
_OWN = ("height", "width", "num_frames", "max_area", "guidance_scale")
EACH = [
    pytest.param(one, id=one.name, marks=pytest.mark.slow if "Edit" in one.name else ())
    for one in FAMILIES
    if one.name not in ("sd15", "sdxl")  # as which they are tested in the other files
]
FLOW = ("sd3", "flux", "flux2_klein", "wan")


def made(family: Family) -> Any:
    """A pipeline with a scheduler of first order."""
    pipe = family.make()
    if "FlowMatch" not in type(pipe.scheduler).__name__:
        pipe.scheduler = (
            DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
            if family.name == "pixart"
            else FlowMatchEulerDiscreteScheduler(shift=3.0)
        )
    return pipe


def given(family: Family) -> tuple[Any, dict[str, Any]]:
    """What is inverted, a picture or a video, and further arguments of the call."""
    arguments = family.arguments()
    size = arguments.get("width", 128), arguments.get("height", 128)
    frames = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3)).astype(np.uint8))
        for i in range(arguments.get("num_frames", 1))
    ]
    frames = [frame.resize(size) for frame in frames]
    more = {name: one for name, one in arguments.items() if name not in _OWN}
    return frames if "num_frames" in arguments else frames[0], more


def inverted(recipe: Any, family: Family, pipe: Any, **options: Any) -> Inverted:
    image, more = given(family)
    with smaller(type(pipe)):
        found: Inverted = recipe(pipe, image, PROMPT, arguments=more, **options).run()
    return found


class Keeps(Editor):
    """Keeps the latents of the last step, [images, ...]."""

    def after(self, state: Any) -> None:
        self.latents = state.latents


def drawn(found: Inverted, pipe: Any, prompts: list[str], *editors: Editor, **options: Any) -> Any:
    """The latents that the source and its edits end on."""
    keeps = Keeps()
    with smaller(type(pipe)), control(pipe, keeps, strict=False):
        found.edit(pipe, *editors, prompts=prompts, output_type="latent", **options)
    return keeps.latents


@pytest.mark.parametrize("family", EACH)
def test_the_source_is_led_back(family: Family) -> None:
    pipe = made(family)
    guidance = 3.0 if family.guides else 1.0
    found = inverted(DirectInversion, family, pipe, steps=2, guidance=guidance)
    assert torch.equal(drawn(found, pipe, [PROMPT]), found.path[-1])


@pytest.mark.parametrize("family", EACH)
def test_inverted_and_drawn_again(family: Family) -> None:
    """By the refined inverse sampling leads back of itself; step by step, since random weights
    bend paths more than trained ones do."""
    pipe = made(family)
    found = inverted(DDIMInversion, family, pipe, steps=10, refine=12)
    with smaller(type(pipe)):
        program = found.program(pipe, [PROMPT], 1.0)
    program.write(found.path[-2], level=9)
    again = program.denoise(9)
    assert (again - found.path[-1]).norm() < 1e-3 * found.path[-1].norm()


class Same(Editor):
    """The identity of an edit of attention: every row gets the source's values, of its own text."""

    sites = "self, joint"

    def __init__(self) -> None:
        self.calls = 0

    def attention(self, call: AttentionCall) -> None:
        for row in call.rows:
            if row.prompt == 1:
                source = call.rows.twin(row, prompt=0)
                call.borrow(row, q=source, k=source, v=source)
                self.calls += 1


@pytest.mark.parametrize("family", EACH)
def test_an_identity_edit_is_the_source_again(family: Family) -> None:
    if len(family.prompts) < 2:
        return  # this pipeline draws one prompt at a time
    pipe = made(family)
    found = inverted(DDIMInversion, family, pipe, steps=3)
    alone = drawn(found, pipe, [PROMPT])
    edit: Editor = PromptToPrompt([PROMPT, PROMPT])
    record = families.pipeline_of(pipe)
    if record is not None and isinstance(record.text, str):  # why words can't be addressed
        with pytest.raises(UnsupportedError, match="can't be addressed"):
            drawn(found, pipe, [PROMPT, PROMPT], edit, guidance=1.0)
        edit = Same()
    source, edited = drawn(found, pipe, [PROMPT, PROMPT], edit, guidance=1.0)
    torch.testing.assert_close(source, alone[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(edited, source, atol=1e-4, rtol=1e-3)
    other = drawn(found, pipe, [PROMPT, TARGET], guidance=1.0)
    assert (other[1] - other[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", EACH)
def test_texts_in_place_of_the_empty_one(family: Family) -> None:
    if not family.guides:
        with pytest.raises(UnsupportedError, match="its model was taught a scale; give embedded="):
            inverted(NullTextInversion, family, made(family), steps=2)
        return
    pipe, prompts = made(family), [PROMPT, TARGET][: len(family.prompts)]
    # The source's own text in the negative's place: guided is unguided.
    found = inverted(NegativePromptInversion, family, pipe, steps=2, guidance=3.0)
    plain = inverted(DDIMInversion, family, pipe, steps=2)
    guided = drawn(found, pipe, prompts)
    torch.testing.assert_close(guided[:1], drawn(plain, pipe, [PROMPT])[:1], atol=1e-3, rtol=1e-3)
    fitted = inverted(NullTextInversion, family, pipe, steps=2, guidance=3.0, iterations=2)
    assert drawn(fitted, pipe, prompts).isfinite().all()


@pytest.mark.parametrize("name", [name for name in FLOW if name in BY_NAME])
def test_noise_of_every_step(name: str) -> None:
    """Schedulers of flow matching whose steps take noise carry the image too."""
    family = BY_NAME[name]
    pipe = made(family)
    with pytest.raises(
        UnsupportedError, match=r"step takes no variance_noise; use .*flow matching"
    ):
        inverted(EditFriendlyDDPM, family, pipe, steps=3)
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="sde-dpmsolver++",
        use_dynamic_shifting="flux" in name,
    )
    found = inverted(EditFriendlyDDPM, family, pipe, steps=4, skip=0.0)
    ends = drawn(found, pipe, [PROMPT, TARGET])
    assert torch.equal(ends[:1], found.path[-1])
    assert not torch.equal(ends[1:], ends[:1])


def test_a_solver_of_second_order_is_refused_with_one_that_would_do() -> None:
    family = BY_NAME["WanPipeline of two denoisers"]
    with pytest.raises(UnsupportedError, match=r"FlowMatchEulerDiscreteScheduler\(shift=3\)"):
        inverted(DDIMInversion, family, family.make(), steps=3)


@pytest.mark.parametrize("name", [name for name in ("flux", "HunyuanVideoPipeline")])
def test_the_scale_that_a_model_was_taught_is_another_for_edits(name: str) -> None:
    family = BY_NAME[name]
    pipe = made(family)
    found = inverted(DDIMInversion, family, pipe, steps=3, embedded=1.0)
    same = drawn(found, pipe, [PROMPT, PROMPT], guidance=1.0)
    other = drawn(found, pipe, [PROMPT, PROMPT], guidance=1.0, embedded=6.0)
    torch.testing.assert_close(other[0], same[0], atol=1e-4, rtol=1e-3)
    assert (other[1] - same[1]).abs().max() > 1e-4
