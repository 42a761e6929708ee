"""Programs draw what the pipeline draws, in any order, and editors act in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.inversion import require_first_order
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import FreeU, PromptToPrompt
from tests import zoo
from tests.families.fingerprint import unchanged
from tests.hookctl.drawing import TWO

SCHEDULERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
]


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def make(name: str = "sd15", scheduler: Any = None) -> Any:
    pipe = zoo.PIPELINES[name].make()
    if scheduler is not None:
        config = {**pipe.scheduler.config, "skip_prk_steps": True}
        pipe.scheduler = scheduler.from_config(config)
    return pipe


def drawn(pipe: Any, prompts: list[str], n: int = 1, steps: int = 3, **kwargs: Any) -> Tensor:
    given = {"guidance_scale": 4.0, "negative_prompt": ["blurry"] * len(prompts), **kwargs}
    if given["guidance_scale"] <= 1:
        del given["negative_prompt"]
    latents: Tensor = pipe(
        prompts,
        num_inference_steps=steps,
        num_images_per_prompt=n,
        generator=seeded(n * len(prompts)),
        output_type="latent",
        return_dict=False,
        **given,
    )[0]
    return latents


def program(pipe: Any, prompts: list[str], n: int = 1, steps: int = 3, **kwargs: Any) -> Trajectory:
    given = {"guidance": 4.0, "negative": "blurry", **kwargs}
    return Trajectory(
        pipe, prompts, steps=steps, images=n, generator=seeded(n * len(prompts)), **given
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_plain_program_draws_what_the_pipeline_draws(scheduler: Any) -> None:
    pipe = make("sd15", scheduler)
    assert torch.equal(program(pipe, TWO, n=2).run(), drawn(pipe, TWO, n=2))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart"])
def test_other_families_too(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    expected = case.run(pipe, TWO, steps=3, guidance=4.0)
    options = {"pixart": {"clean_caption": False, "use_resolution_binning": False}}
    sizes = {"height": 128, "width": 128, "max_sequence_length": 16}
    given = {**(sizes if name != "sdxl" else {}), **options.get(name, {})}
    with unchanged(pipe):
        assert torch.equal(program(pipe, TWO, **given).run(), expected)


def test_without_guidance_and_with_fresh_noise() -> None:
    pipe = make()
    assert torch.equal(program(pipe, TWO, guidance=1.0).run(), drawn(pipe, TWO, guidance_scale=1.0))
    assert torch.equal(program(pipe, TWO, eta=0.7).run(), drawn(pipe, TWO, eta=0.7))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_editors_act_in_a_program_as_in_the_pipeline(scheduler: Any) -> None:
    prompts = ["a red cat above a dog", "a blue cat above a dog"]
    pipe = make("sd15", scheduler)
    edit = PromptToPrompt(prompts, blend="cat")
    with hookctl.control(pipe, edit, FreeU()):
        expected = drawn(pipe, prompts)
        given = program(pipe, prompts).run()
        again = drawn(pipe, prompts)
    assert torch.equal(given, expected)
    assert torch.equal(again, expected)


class Watch(Editor):
    """Notes every call of each hook."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def begin(self, state: Any) -> None:
        self.seen.append(("begin", state.prompts, state.images_per_prompt))

    def before(self, state: Any) -> None:
        self.seen.append(("before", state.clock.step, repr(state.rows)))
        self.latents = state.latents

    def features(self, call: Any) -> None:
        if not self.seen or self.seen[-1] != ("features", call.clock.step, len(call.rows)):
            self.seen.append(("features", call.clock.step, len(call.rows)))

    def combine(self, predictions: Any) -> Tensor:
        self.seen.append(("combine", *predictions.branches))
        return predictions.guided

    def after(self, state: Any) -> None:
        self.seen.append(("after", state.clock.step))
        self.latents = state.latents


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_an_editor_sees_who_and_when(scheduler: Any) -> None:
    pipe, watch = make("sd15", scheduler), Watch()
    with hookctl.control(pipe, watch):
        run = program(pipe, TWO)
        start = run.latents
        run.denoise(0)
        assert torch.equal(watch.latents, run.latents)
        run.renoise(1, 0, torch.Generator().manual_seed(1))
        run.denoise(0)
        run.invert(0)
    rows = "uncond[0.0] uncond[1.0] cond[0.0] cond[1.0]"
    step = [("before", 0, rows), ("features", 0, 4), ("combine", "uncond", "cond"), ("after", 0)]
    assert watch.seen == [("begin", tuple(TWO), 1), *step, *step, ("features", 0, 2)]
    assert not torch.equal(start, run.latents)


def test_a_program_settles_a_step_before_the_editors_after() -> None:
    pipe, watch = make(), Watch()
    offset = torch.zeros(2, 1, 1, 1)
    offset[0] = 1.0
    plain = program(pipe, TWO).denoise(0)
    with hookctl.control(pipe, watch):
        moved = program(pipe, TWO).denoise(0, adjust=lambda x: x + offset)
        assert torch.equal(watch.latents, moved)
    assert torch.equal(moved, plain + offset)
    assert torch.equal(program(pipe, TWO).denoise(0, adjust=lambda x: x + offset), moved)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_going_back_does_not_confuse_a_multistep_solver(scheduler: Any) -> None:
    pipe = make("sd15", scheduler)
    run, expected = program(pipe, TWO, steps=4), drawn(pipe, TWO, steps=4)
    kept = []
    for i in range(4):
        kept.append(run.latents)
        run.denoise(i)
    assert torch.equal(run.latents, expected)
    drawn(pipe, TWO, steps=2)  # somebody else uses the scheduler meanwhile
    run.write(kept[2], level=2)
    assert torch.equal(run.run(), expected)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, None])
def test_the_refined_inverse_leads_back(scheduler: Any) -> None:
    pipe = make("sd3" if scheduler is None else "sd15", scheduler)
    run = program(pipe, TWO, steps=10)
    errors = []
    for refine in (0, 12):
        run.write(torch.randn(2, 4, 16, 16, generator=seeded(1)[0]), level=10)
        wanted = run.latents
        run.invert(9, refine=refine)
        run.denoise(9, guidance=1.0)
        errors.append(float((run.latents - wanted).abs().max()))
    assert errors[1] < 1e-4 and errors[1] < errors[0]


def test_timestep_convention() -> None:
    """'source' is the ordinary first-order step upwards from the latents' own prediction."""
    pipe = make()
    run = program(pipe, TWO, guidance=1.0)
    x = torch.randn(2, 4, 16, 16, generator=seeded(1)[0])
    run.write(x, level=2)
    x0, eps = run.noise.split(x, run.predict(x, 2), run.levels[2])
    assert torch.equal(run.invert(1, timestep="source"), run.levels[1].mix(x0, eps))
    with pytest.raises(InputError, match="timestep='up'"):
        run.invert(0, timestep="up")


def test_guidance_contexts_and_noise_of_one_step() -> None:
    pipe = make()
    other = torch.randn(1, 77, 32, generator=seeded(1)[0])
    plain = [program(pipe, TWO).denoise(0, guidance=s) for s in (2.0, 5.0)]
    mixed = program(pipe, TWO).denoise(0, guidance=[2.0, 5.0])
    torch.testing.assert_close(mixed[0], plain[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[1], plain[1][1], atol=1e-5, rtol=0)
    run = program(pipe, TWO)
    own = run.template.arguments["encoder_hidden_states"]
    same = run.denoise(0, contexts={"uncond": own[:2], "cond": own[2:]})
    assert torch.equal(same, program(pipe, TWO).denoise(0))
    assert not torch.equal(program(pipe, TWO).denoise(0, contexts={"uncond": other}), same)
    z = torch.randn(2, 4, 16, 16, generator=seeded(1)[0])
    noisy = [program(pipe, TWO).denoise(0, eta=1.0, noise=f * z) for f in (0.0, 1.0)]
    ratio = ((noisy[1] - noisy[0]) / z).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-3, rtol=1e-2)


def test_one_branch_alone_is_what_it_is_among_all() -> None:
    run = program(make("sdxl"), TWO)
    every = run.branches(run.latents, 0)
    for name, part in every.items():
        alone = run.branches(run.latents, 0, [name])[name]
        torch.testing.assert_close(alone, part, atol=1e-5, rtol=1e-4)


def test_write_takes_a_mask() -> None:
    run = program(make(), TWO)
    before = run.latents
    mask = torch.zeros(16, 16)
    mask[:8] = 1
    run.write(torch.ones(1, 4, 16, 16), mask)
    assert bool((run.latents[..., :8, :] == 1).all())
    assert torch.equal(run.latents[..., 8:, :], before[..., 8:, :])


def test_images_are_the_pipelines() -> None:
    pipe = make()
    run = program(pipe, TWO)
    run.run()
    expected = drawn(pipe, TWO)
    assert torch.equal(run.latents, expected)
    images = run.decode("pt")
    given = pipe(
        TWO,
        negative_prompt=["blurry"] * 2,
        guidance_scale=4.0,
        num_inference_steps=3,
        generator=seeded(2),
        output_type="pt",
    ).images
    assert torch.equal(images, given)


@pytest.mark.parametrize("name", ["controlnet", "instruct_pix2pix", "sd15_pag"])
def test_what_programs_cannot_drive_is_refused(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    case.run(pipe)
    extra: dict[str, Any] = {"generator": seeded(1)}
    if name in ("controlnet", "instruct_pix2pix"):
        extra["image"] = torch.zeros(1, 3, 128, 128)
    with unchanged(pipe), pytest.raises(UnsupportedError, match="programs"):
        Trajectory(pipe, "a cat", steps=2, guidance=4.0, **extra)


def test_bad_input() -> None:
    run = program(make(), TWO)
    with pytest.raises(InputError, match="level 0, not at 1"):
        run.denoise(1)
    with pytest.raises(InputError, match="steps 0 to 2"):
        run.denoise(3)
    with pytest.raises(InputError, match="one for each of 2 images"):
        run.denoise(0, guidance=[1.0])
    with pytest.raises(InputError, match="contexts"):
        run.denoise(0, contexts={"perturbed": torch.zeros(1, 77, 32)})
    with pytest.raises(InputError, match="level=4"):
        run.write(run.latents, level=4)
    with pytest.raises(InputError, match="no unconditional rows"):
        program(make(), TWO, guidance=1.0).denoise(0, guidance=3.0)
    with pytest.raises(UnsupportedError, match="eta"):
        program(make("sd15", EulerDiscreteScheduler), TWO).denoise(0, eta=1.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_factors_are_those_of_the_scheduler(spacing: str, kind: str) -> None:
    """Also where DDIM's steps end between two of its timesteps."""
    pipe = make()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        timestep_spacing=spacing,
        prediction_type=kind,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    run = Trajectory(pipe, "a cat", steps=7, generator=seeded(1))
    x, prediction = torch.randn(2, 1, 4, 16, 16, generator=seeded(1)[0], dtype=torch.float64)
    for i in range(run.steps):
        alpha, beta = run.factors(i)
        stepped = run.solver.at(i, prediction, x)
        assert torch.allclose(stepped, alpha * x + beta * prediction, atol=1e-6)
    require_first_order(run, "this")


def test_timesteps_that_the_model_does_not_know() -> None:
    pipe = make()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1)
    with pytest.raises(InputError, match="timestep 1000: the model knows 0 to 999; take fewer"):
        Trajectory(pipe, "a cat", steps=1000)


def test_what_a_pipeline_needs_besides_is_asked_for() -> None:
    case = zoo.PIPELINES["controlnet"]
    with pytest.raises(UnsupportedError, match="ControlNetPipeline computes its control anew"):
        Trajectory(case.make(), "a cat", steps=2)
    with pytest.raises(InputError, match="can't prepare a run with height.*divisible by 8"):
        Trajectory(make(), "a cat", steps=2, height=13, width=13)


def test_texts_that_stand_once_for_every_frame() -> None:
    """AnimateDiff repeats them in its pipeline; some rows alone have their own of them."""
    case = zoo.PIPELINES["animatediff"]
    pipe, texts = case.make(), ["a red cat", "a blue dog"]
    generator = torch.Generator().manual_seed(0)
    program = Trajectory(
        pipe, texts, steps=2, guidance=5.0, generator=generator, height=32, width=32, num_frames=4
    )
    cond, uncond = pipe.encode_prompt(texts, "cpu", 1, True)
    assert torch.equal(program.template.text("cond"), cond)
    assert torch.equal(program.template.text("uncond"), uncond)
    with torch.no_grad():
        both = program.branches(program.latents, 0)["cond"]
        alone = program.branches(program.latents, 0, ["cond"])["cond"]
        said = program.branches(program.latents, 0, ["cond"], {"cond": cond})["cond"]
    torch.testing.assert_close(alone, both, rtol=1e-4, atol=1e-5)
    assert torch.equal(said, alone)
