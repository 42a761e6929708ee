"""FlowEdit: the official code in float64, its identities, masks, editors, and what it refuses."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from hookctl import AttentionCall, Editor
from hookctl.address.regions import Region
from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes import PAG, FlowEdit, PromptToPrompt
from hookctl.recipes.common.real_images.flow import is_taught_scale
from tests.hookctl.loop.families import BY_NAME, FAMILIES
from tests.recipes.images import counted, image
from tests.recipes.literal_flow import SD3, TOKENS, Flux, flow_edit
from tests.recipes.runs import made, relative
from tests.recipes.test_inversions_of_families import given
from tests.recipes.test_inversions_of_families import made as of_first_order
from tests.zoo.wild import WILD
from tests.zoo.wild.around import smaller

TWO = ["a red cat", "a blue dog"]
SHORT: dict[str, Any] = {"arguments": {"max_sequence_length": TOKENS}}
TOLERANCE = 1e-10  # float64, some steps guided by up to 13.5


def latents(name: str = "sd3", *editors: Editor, dtype: Any = torch.float32, **more: Any) -> Tensor:
    """Of the image and its edits; by default four steps of six."""
    options: dict[str, Any] = {"steps": 6, "n_max": 4, **SHORT, **more}
    prompts = options.pop("prompts", TWO)
    edit = FlowEdit(made(name, dtype), image(), prompts, **options)
    found: Tensor = edit.run(*editors, output_type="latent")
    return found


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize(("n_min", "n_avg"), [(0, 1), (2, 2)])
def test_paper_is_the_official_code(name: str, n_min: int, n_avg: int) -> None:
    pipe = made(name, torch.float64)
    model = SD3(pipe, 6) if name == "sd3" else Flux(pipe, 6, 64)
    x = model.encode(image())
    scales = (1.5, 5.5) if name == "flux" else (3.5, 13.5)
    counts = {"n_max": 4, "n_min": n_min, "n_avg": n_avg}
    generator = torch.Generator().manual_seed(3)
    want = flow_edit(model, x, TWO, scales=scales, generator=generator, **counts)
    got = latents(name, dtype=torch.float64, seed=3, paper=True, **counts)
    assert torch.equal(got[:1], x)
    assert relative(got[1:], want) < TOLERANCE
    ours = latents(name, dtype=torch.float64, seed=3, **counts)
    assert relative(ours, got) < 1e-6  # sigmas in the place of timesteps / 1000, in single
    assert relative(want, x) > 1e-2


def test_published_numbers() -> None:
    sd3, flux = (FlowEdit(made(name), image(), TWO) for name in ("sd3", "flux"))
    assert (sd3.steps, sd3.n_max, sd3.scales) == (50, 33, [3.5, 13.5])
    assert (flux.steps, flux.n_max, flux.scales) == (28, 24, [1.5, 5.5])
    assert FlowEdit(made("flux"), image(), TWO, steps=7).n_max == 6


FLOW = [
    pytest.param(
        one.name, id=one.name, marks=() if one.name in ("sd3", "flux") else pytest.mark.slow
    )
    for one in FAMILIES
    if one.name not in ("sd15", "sdxl", "pixart") and len(one.prompts) > 1
]


@pytest.mark.parametrize("name", FLOW)
def test_equal_prompts_and_scales_are_the_image(name: str) -> None:
    """And another prompt is another image, in every family."""
    family = BY_NAME[name]
    pipe = of_first_order(family)
    source, more = given(family)
    scale = 3.0 if is_taught_scale(pipe) or family.guides else 1.0
    options: dict[str, Any] = {
        "steps": 3,
        "n_max": 2,
        "guidance": (scale, scale),
        "arguments": more,
    }
    with smaller(type(pipe)):
        same = FlowEdit(pipe, source, [TWO[0]] * 2, **options)
        program = same._program(same.prompts, same.scales)
        found = same._edited(program)
        other = FlowEdit(pipe, source, TWO, **options)
        moved = other._edited(program=other._program(other.prompts, other.scales))
    assert (found[1:] - same.clean).abs().max() <= 1e-5
    assert relative(moved[1:], other.clean) > 1e-3
    assert torch.equal(moved[:1], other.clean.to(moved))


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_a_pipeline_of_one_prompt_at_a_time_is_refused(name: str) -> None:
    family = BY_NAME[name]
    pipe = of_first_order(family)
    source, more = given(family)
    edit = FlowEdit(pipe, source, TWO, steps=3, guidance=(1.0, 1.0), arguments=more)
    with pytest.raises(UnsupportedError, match=f"FlowEdit: {name} reads one prompt at a time"):
        edit.run()


def test_the_more_steps_the_further() -> None:
    away = [relative(found[1:], found[:1]) for n in (0, 1, 3, 6) for found in [latents(n_max=n)]]
    assert away[0] == 0 and away == sorted(away)
    assert torch.equal(latents(), latents()) and not torch.equal(latents(), latents(seed=1))


def test_several_edits_share_the_noise() -> None:
    both = latents(prompts=[*TWO, "a green tree"])
    torch.testing.assert_close(both[:2], latents(), atol=1e-5, rtol=1e-5)
    assert relative(both[2:], both[1:2]) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("n_min", [0, 2])
def test_outside_the_mask_it_is_the_image_bit_for_bit(name: str, n_min: int) -> None:
    pixels = Image.new("L", (128, 128))
    pixels.paste(255, (0, 0, 64, 128))
    options = {"n_min": n_min}
    masked, free = latents(name, mask=pixels, **options), latents(name, **options)
    edit = FlowEdit(made(name), image(), TWO, steps=6, n_max=4, **SHORT)
    program = edit._program(edit.prompts, edit.scales)
    x, z = program.unpacked(masked)
    assert torch.equal(x[..., 8:], z[..., 8:]) and not torch.equal(x[..., :8], z[..., :8])
    assert not torch.equal(*program.unpacked(free)[..., 8:])
    small = np.zeros((16, 16), bool)
    small[:, :8] = True
    assert torch.equal(latents(name, mask=small, **options), masked)
    assert torch.equal(latents(name, mask=Region.box(0, 0, 0.5, 1), **options), masked)


def test_half_precision() -> None:
    same = latents(dtype=torch.bfloat16, prompts=[TWO[0]] * 2, guidance=(4.0, 4.0))
    assert same.dtype == torch.bfloat16 and torch.equal(same[:1], same[1:])
    assert relative(latents(dtype=torch.bfloat16).float(), latents()) < 0.2


def test_cost() -> None:
    pipe = made("sd3", torch.float32)
    with counted(pipe, "transformer") as rows:
        latents()
        assert rows == [4] * 4
        rows.clear()
        latents(n_avg=2, n_min=1)
        assert rows == [4] * 7
        rows.clear()
        latents(guidance=(1.0, 1.0))
        assert rows == [2] * 4


# -- editors -----------------------------------------------------------------------------------


class Same(Editor):
    """Every row gets the source's attention, of its own branch."""

    sites = "self, joint"

    def attention(self, call: AttentionCall) -> None:
        for row in call.rows:
            if row.prompt == 1:
                source = call.rows.twin(row, prompt=0)
                call.borrow(row, q=source, k=source, v=source)


def test_editors_act_between_source_and_edit() -> None:
    plain = latents()
    routed = latents("sd3", PromptToPrompt(TWO, self_replace=0.0))
    assert relative(routed[1:], plain[1:]) > 1e-4 and torch.equal(routed[:1], plain[:1])
    equal = {"guidance": (4.0, 4.0)}
    held, free = latents("sd3", Same(), **equal), latents(**equal)
    assert relative(held[1:], free[1:]) > 1e-3


def test_windows_count_from_the_first_step_taken() -> None:
    seen: list[tuple[int, int]] = []

    class Clocks(Editor):
        sites = "joint"

        def attention(self, call: AttentionCall) -> None:
            seen.append((call.clock.step, call.clock.steps))

    latents("sd3", Clocks())
    assert sorted(set(seen)) == [(i, 4) for i in range(4)]


@pytest.mark.parametrize(
    "editor", [PAG(), PromptToPrompt(TWO, blend=("cat", "dog"))], ids=["PAG", "blend"]
)
def test_editors_of_steps_are_refused(editor: Editor) -> None:
    with pytest.raises(UnsupportedError, match=f"no steps of a scheduler, which {editor.name}"):
        latents("sd3", editor)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_max": 7}, "FlowEdit: n_max=7; give a whole number from 0 to 6"),
        ({"n_min": 5}, "FlowEdit: n_min=5; give a whole number from 0 to 4"),
        ({"n_avg": 0}, "FlowEdit: n_avg=0; give a whole number of 1 or more"),
        ({"prompts": TWO[:1]}, "the image's prompt and at least one edit"),
        ({"mask": np.ones((4, 8))}, "a mask of 4 x 8 for an image of 128 x 128 px"),
        ({"guidance": (1.0,)}, "FlowEdit: guidance="),
        ({"arguments": {"latents": None}}, "are given to the pipeline by the inversion"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    with counted(made("sd3", torch.float32), "transformer") as rows:
        with pytest.raises(InputError, match=says):
            latents(**options)
    assert not rows


def test_other_models_and_schedulers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline with .* is not; .*Direct"):
        FlowEdit(made("sd15"), image(), TWO)
    pipe = BY_NAME["sd3"].make()
    for scheduler in (
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ):
        pipe.scheduler = scheduler
        with counted(pipe, "transformer") as rows:
            with pytest.raises(UnsupportedError, match="FlowEdit needs .* first-order scheduler"):
                FlowEdit(pipe, image(), TWO, steps=4).run()
        assert len(rows) <= 1  # that of the pattern, which is stopped before it is computed


@pytest.mark.skipif(not hasattr(diffusers, "JoyImageEditPlusPipeline"), reason="newer diffusers")
def test_latents_of_an_unknown_form_are_refused() -> None:
    pipe = WILD["JoyImageEditPlusPipeline"].original
    with counted(pipe, "transformer") as rows:
        with pytest.raises(UnsupportedError, match="has latents of a form unknown here"):
            FlowEdit(pipe, Image.new("RGB", (32, 32)), TWO, steps=2).run()
    assert len(rows) <= 1
