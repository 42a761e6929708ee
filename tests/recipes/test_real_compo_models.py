"""RealCompo: the official loop, whole pipelines as the layout model, and what its defaults do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionGLIGENPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

import hookctl
from hookctl.address.text import TextLayout
from hookctl.errors import InputError
from hookctl.recipes import FreeU, LayoutGuidance, RealCompo
from tests import zoo
from tests.marks import examples
from tests.recipes.literal_real_compo import RealCompoLoop
from tests.recipes.runs import SD15, TWO, relative
from tests.recipes.test_real_compo import other
from tests.zoo.case import sharpen
from tests.zoo.unets import SD15 as SIZES

PROMPTS = ["a red cat above a blue square", "a blue dog"]
WORDS = [["cat", "square"], ["dog"]]
CUT = [[(0.1, 0.2, 0.7, 0.9), (0.45, 0.0, 1.0, 0.6)], [(0.05, 0.3, 0.9, 0.95)]]
BOXES = [(0.1, 0.1, 0.5, 0.6)]
TOLERANCE = 1e-10  # float64; gradients count a million times


# -- the official loop -----------------------------------------------------------------------------


@pytest.mark.parametrize("plms", examples([False, True], [True]))
def test_paper_is_the_official_code(plms: bool) -> None:
    """In float64, of boxes that cut cells; each image of a batch as if alone."""
    pipe = SD15.make().to(torch.float64)
    if plms:
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        setattr(pipe.scheduler, name, getattr(pipe.scheduler, name).double())
    layout, steps = other(pipe), 6
    edit = RealCompo(WORDS, CUT, layout, alone=0.34, paper=True)
    with hookctl.control(pipe, edit):
        for _ in range(2):  # a run takes nothing over from the one before
            got = SD15.run(pipe, PROMPTS, steps=steps)
    loop = RealCompoLoop(pipe, layout, steps=steps, guidance=SD15.guidance, plms=plms)
    words = TextLayout(pipe)
    for i, prompt in enumerate(PROMPTS):
        text = words.read(prompt)
        tokens = [text.find(word)[0] for word in WORDS[i]]
        with loop.layout.written_out():
            want, d = loop.run(prompt, CUT[i], tokens, t0=2, seed=i)
        assert relative(edit.d[i], d[0]) < TOLERANCE
        assert relative(got[i], want[0]) < TOLERANCE
    plain = RealCompo(WORDS, CUT, layout, alone=0.34)
    with hookctl.control(pipe, plain):
        assert relative(SD15.run(pipe, PROMPTS, steps=steps), got) > 1e-4


# -- whole pipelines -------------------------------------------------------------------------------


def gligen() -> Any:
    """A GLIGEN pipeline whose boxes matter."""
    up = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    base = SD15.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            in_channels=4, up_block_types=up, attention_type="gated", **SIZES
        ).eval()
        sharpen(unet)
        for name, parameter in unet.named_parameters():
            if name.endswith(("alpha_attn", "alpha_dense")):
                torch.nn.init.constant_(parameter, 0.5)
    components = {k: v for k, v in base.components.items() if k != "image_encoder"}
    pipe = StableDiffusionGLIGENPipeline(
        **{**components, "unet": unet}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlled() -> Any:
    base = SD15.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = ControlNetModel.from_unet(base.unet)
        for name, parameter in net.named_parameters():
            if "controlnet_down" in name or "controlnet_mid" in name or "conv_out" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    components = {k: v for k, v in base.components.items() if k != "image_encoder"}
    pipe = StableDiffusionControlNetPipeline(
        **components, controlnet=net.eval(), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def v_predicting() -> Any:
    pipe = SD15.make()
    pipe.unet = other(pipe)
    config = {**pipe.scheduler.config, "prediction_type": "v_prediction"}
    pipe.scheduler = type(pipe.scheduler).from_config(config)
    return pipe


CONTROL = Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 50).convert("RGB")
PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gligen": (
        gligen,
        {
            "gligen_phrases": ["cat"],
            "gligen_boxes": [list(BOXES[0])],
            "gligen_scheduled_sampling_beta": 0.5,
        },
    ),
    "controlnet": (
        controlled,
        {"image": CONTROL, "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.6},
    ),
    "v_prediction": (v_predicting, {}),
}


def drawn(pipe: Any, prompts: list[str], **arguments: Any) -> Tensor:
    latents: Tensor = SD15.run(pipe, prompts, steps=4, **arguments)
    return latents


@pytest.mark.slow
@pytest.mark.parametrize("kind", PIPELINES)
def test_alone_a_layout_pipeline_draws_what_it_draws(kind: str) -> None:
    """With its boxes or its control image, in the steps that they act in, and its predictions."""
    make, arguments = PIPELINES[kind]
    pipe, layout = SD15.make().to(torch.float64), make().to(torch.float64)
    prompts = ["a red cat", "a blue cat"]
    want = drawn(layout, prompts, **arguments)
    state = torch.get_rng_state()
    edit = RealCompo(["cat"], BOXES, layout, layout_arguments=arguments, coefficient=1.0)
    with hookctl.control(pipe, edit):
        assert relative(drawn(pipe, prompts), want) < 1e-6  # the scheduler's float32 levels
        assert relative(drawn(pipe, prompts), want) < 1e-6
    assert torch.equal(torch.get_rng_state(), state)
    assert relative(drawn(pipe, prompts), want) > 1e-2
    if kind == "controlnet":
        moved = {**arguments, "image": CONTROL.transpose(Image.Transpose.ROTATE_90)}
    else:
        moved = {**arguments, "gligen_boxes": [[0.6, 0.5, 1.0, 1.0]]}
    if kind != "v_prediction":
        again = RealCompo(["cat"], BOXES, layout, layout_arguments=moved, coefficient=1.0)
        with hookctl.control(pipe, again):
            assert relative(drawn(pipe, prompts), want) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("paper", [False, True])
def test_a_layout_pipeline_is_mixed_and_its_maps_are_read(kind: str, paper: bool) -> None:
    make, arguments = PIPELINES[kind]
    pipe, layout = SD15.make(), make()
    edit = RealCompo(
        ["cat"], BOXES, layout, layout_arguments=arguments, alone=0.25, paper=paper,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    plain = drawn(pipe, ["a red cat"])
    layouts = drawn(layout, ["a red cat"], **arguments)
    with hookctl.control(pipe, edit):
        mixed = drawn(pipe, ["a red cat"])
    assert all(relative(mixed, one) > 1e-3 for one in (plain, layouts))
    assert [step for step, _ in edit.record] == [0, 1, 2, 3]
    assert torch.equal(drawn(pipe, ["a red cat"]), plain)
    assert torch.equal(drawn(layout, ["a red cat"], **arguments), layouts)


def test_gligen_takes_words_and_boxes_of_the_mixture() -> None:
    pipe, layout = SD15.make(), gligen()
    given = {"gligen_phrases": ["cat"], "gligen_boxes": [list(BOXES[0])]}
    want = drawn(layout, ["a red cat"], **given, gligen_scheduled_sampling_beta=1.0)
    with hookctl.control(pipe, RealCompo(["cat"], BOXES, layout, coefficient=1.0)):
        assert relative(drawn(pipe, ["a red cat"]), want) < 1e-4
    each = RealCompo([["cat"], ["dog"]], [BOXES, BOXES], layout)
    with pytest.raises(InputError, match="one list of boxes"), hookctl.control(pipe, each):
        drawn(pipe, TWO)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, PNDMScheduler])
def test_other_schedulers_and_editors_of_the_layout_pipeline(scheduler: Any) -> None:
    pipe, layout = SD15.make(), SD15.make()
    layout.unet = other(layout)
    skip = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    for one in (pipe, layout):
        one.scheduler = scheduler.from_config(one.scheduler.config, **skip)
    with hookctl.control(layout, FreeU()):
        want = drawn(layout, ["a red cat"])
        with hookctl.control(pipe, RealCompo(["cat"], BOXES, layout, coefficient=1.0)):
            assert relative(drawn(pipe, ["a red cat"]), want) < 1e-4
    assert relative(drawn(layout, ["a red cat"]), want) > 1e-4


@pytest.mark.slow
def test_a_layout_pipeline_over_the_same_unet() -> None:
    pipe, layout = SD15.make(), controlled()
    layout.unet = pipe.unet
    arguments = PIPELINES["controlnet"][1]
    want, plain = drawn(layout, ["a red cat"], **arguments), drawn(pipe, ["a red cat"])

    def mixture(**options: Any) -> Tensor:
        edit = RealCompo(["cat"], BOXES, layout, layout_arguments=arguments, **options)
        with hookctl.control(pipe, edit):
            return drawn(pipe, ["a red cat"])

    assert relative(mixture(coefficient=1.0), want) < 1e-5
    assert all(relative(mixture(alone=0.25), one) > 1e-3 for one in (want, plain))
    assert torch.equal(drawn(pipe, ["a red cat"]), plain)


@pytest.mark.slow
def test_bad_pipelines() -> None:
    pipe, layout = SD15.make(), SD15.make()
    with pytest.raises(InputError, match="the controlled pipeline itself"):
        hookctl.control(pipe, RealCompo(["cat"], BOXES, pipe)).__enter__()
    with pytest.raises(InputError, match="'gligen_boxes' is none of its call's"):
        RealCompo(["cat"], BOXES, layout, layout_arguments={"gligen_boxes": []})
    with pytest.raises(InputError, match="'latents' is set by the mixture"):
        RealCompo(["cat"], BOXES, layout, layout_arguments={"latents": None})
    with pytest.raises(InputError, match="give them with a pipeline"):
        RealCompo(["cat"], BOXES, layout_arguments={})
    layout.scheduler = DDIMScheduler.from_config(layout.scheduler.config, steps_offset=0)
    with (
        pytest.raises(InputError, match="give both one scheduler"),
        hookctl.control(pipe, RealCompo(["cat"], BOXES, layout)),
    ):
        drawn(pipe, ["a red cat"])
    # What the pipeline itself refuses is told, before anything is drawn; and nothing is left.
    wrong = RealCompo(["cat"], BOXES, controlled(), layout_arguments={"image": "x"})
    with pytest.raises(Exception, match="image"), hookctl.control(pipe, wrong):
        drawn(pipe, ["a red cat"])
    assert torch.equal(drawn(pipe, ["a red cat"]), drawn(SD15.make(), ["a red cat"]))


@pytest.mark.slow
def test_a_run_that_ends_early_leaves_nothing_running() -> None:
    import threading

    pipe, layout = SD15.make(), SD15.make()
    layout.unet = other(layout)
    plain = drawn(layout, ["a red cat"])

    class Broken(Exception):
        pass

    def fail(pipe: Any, step: int, time: Any, given: Any) -> Any:
        if step == 1:
            raise Broken
        return given

    edit = RealCompo(["cat"], BOXES, layout)
    with pytest.raises(Broken), hookctl.control(pipe, edit):
        drawn(pipe, ["a red cat"], callback_on_step_end=fail)
    assert torch.equal(drawn(layout, ["a red cat"]), plain)
    with hookctl.control(pipe, edit):
        drawn(pipe, ["a red cat"])
    assert not [t for t in threading.enumerate() if t.name == "layout model"]


# -- the defaults ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_by_default_both_models_act_and_the_guidance_lasts() -> None:
    """The guidance alone is what c = 1 would draw; the mixture is neither of both models."""
    pipe = zoo.PIPELINES["sd15"].make().to(torch.float64)

    def run(*editors: Any) -> Tensor:
        with hookctl.control(pipe, *editors):
            return SD15.run(pipe, ["a red cat"], steps=5)

    edit = RealCompo(["cat"], BOXES)
    mixed = run(edit)
    for alone in (LayoutGuidance(["cat"], BOXES), LayoutGuidance(["cat"], BOXES, stop=1.0)):
        assert relative(mixed, run(alone)) > 1e-5
    assert relative(mixed, run()) > 1e-3
    guided = {step for step, _ in edit.layout.guidance.record}
    assert guided == set(range(5))
    given = LayoutGuidance(["cat"], BOXES)
    assert relative(run(RealCompo(["cat"], BOXES, given)), mixed) == 0
    assert given.stop == 0.2  # the caller's own is as it was
    with pytest.raises(InputError, match=r"stops at 0\.3, before the mixture begins at alone=0\.4"):
        RealCompo(["cat"], BOXES, LayoutGuidance(["cat"], BOXES, stop=0.3))
