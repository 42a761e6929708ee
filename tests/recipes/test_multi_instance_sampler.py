"""The multi-instance sampler: an instance's image is a run of its phrase, by any solver."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import hookctl
from hookctl.demos.cost import counted
from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes import MaskedSelfAttention, MultiInstanceSampler, RegionalPrompts
from tests import zoo

A, B = "a red cat above a blue square", "a dog"
SCHEDULERS = (
    "DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "PNDM", "LMSDiscrete",
)  # fmt: skip
FULL, HALVES = (0, 0, 1, 1), ["box:0,0,0.5,1", (0.5, 0, 1, 1)]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_nothing_to_sample_is_bit_identical(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, [A])
    for edit in (
        MultiInstanceSampler([B], [FULL], share=0.0),
        MultiInstanceSampler([B], [FULL], share=0.5, start=0.5),
        MultiInstanceSampler([], []),
    ):
        with hookctl.control(pipe, edit):
            assert torch.equal(case.run(pipe, [A]), plain)
    with hookctl.control(pipe, MultiInstanceSampler([B], [FULL], share=0.5)):
        assert not torch.equal(case.run(pipe, [A]), plain)
    assert torch.equal(case.run(pipe, [A]), plain)


def solved_by(scheduler: str) -> tuple[zoo.Case, Any]:
    """A pipeline with another scheduler."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    kind = getattr(diffusers, f"{scheduler}Scheduler")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return case, pipe


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.slow  # whole runs, solver by solver
def test_an_instance_is_a_run_of_its_phrase(scheduler: str) -> None:
    """Pasted over everything at the end, nothing but the instance's image is left."""
    case, pipe = solved_by(scheduler)
    wanted = case.run(pipe, [B, A], steps=4)
    edit = MultiInstanceSampler([[B], []], [[FULL], []], share=1.0, merge="paste")
    with hookctl.control(pipe, edit):
        found = case.run(pipe, [A, A], steps=4)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.slow  # whole runs, solver by solver
def test_an_instance_leaves_with_what_the_image_has_become(scheduler: str) -> None:
    """One that goes on with the image's own text, and from its history, is the image."""
    case, pipe = solved_by(scheduler)
    wanted = case.run(pipe, [A], steps=6)
    found = {}
    for text in (A, B):
        edit = MultiInstanceSampler([text], [FULL], start=0.5, share=1.0, merge="paste")
        with hookctl.control(pipe, edit):
            found[text] = case.run(pipe, [A], steps=6)
    assert (found[A] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (found[B] - wanted).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize(
    "name", [n for n in ("sdxl", "sd3", "flux", "pixart", "wan", "z_image") if n in zoo.PIPELINES]
)
def test_an_instance_on_every_family(name: str) -> None:
    """Pooled texts and masks are those of the phrase too."""
    case = zoo.PIPELINES[name]
    pipe = case.make()
    wanted = case.run(pipe, [B])
    edit = MultiInstanceSampler([B], [FULL], share=1.0, merge="paste")
    with hookctl.control(pipe, edit):
        found = case.run(pipe, [A])
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_mean_and_its_spread() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    alone = [case.run(pipe, [text]) for text in (A, B)]
    edit = MultiInstanceSampler([B], [FULL], share=1.0)
    with hookctl.control(pipe, edit):
        found = case.run(pipe, [A])
    wanted = torch.stack(alone).mean(0)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    (before, after), *others = edit.spread
    assert not others
    assert before == pytest.approx(float(alone[0].std()), rel=1e-4)
    assert after == pytest.approx(float(wanted.std()), rel=1e-4)
    kept = MultiInstanceSampler([B], [FULL], share=1.0, renormalise=True)
    with hookctl.control(pipe, kept):
        case.run(pipe, [A])
    assert kept.spread[0][0] == pytest.approx(kept.spread[0][1], rel=1e-4)


def test_each_is_pasted_where_it_belongs() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    a, b = case.run(pipe, [A]), case.run(pipe, [B])
    edit = MultiInstanceSampler([B], [HALVES[1]], share=1.0, merge="paste")
    with hookctl.control(pipe, edit):
        found = case.run(pipe, [A])
    half = found.shape[-1] // 2
    wanted = torch.cat([a[..., :half], b[..., half:]], -1)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.slow
def test_the_stack_and_its_cost() -> None:
    """1 + n denoiser calls in the steps of the share, one in the others; further rows untouched."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    texts = [A, B]
    for options in ({"outside": ""}, {"background": (255, 255, 255)}, {"start": 0.25}):
        stack = (
            MultiInstanceSampler(texts, HALVES, share=0.5, merge="paste", edge=0.1, **options),
            RegionalPrompts(texts, HALVES),
            MaskedSelfAttention(HALVES),
        )
        with counted(pipe.unet) as cost, hookctl.control(pipe, *stack):
            found = case.run(pipe, [A], n=2, steps=4)
        assert cost.calls == 4 + 2 * (1 if "start" in options else 2)
        assert bool(torch.isfinite(found).all())


def test_the_generator_of_the_caller_is_left_alone() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    states = []
    for edits in ((), (MultiInstanceSampler([B], [FULL], share=0.5),)):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(1)
        with hookctl.control(pipe, *edits):
            pipe(A, num_inference_steps=2, generator=generator, output_type="latent")
        states.append((generator.get_state(), torch.get_rng_state()))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"share": 1.2}, "share=1.2"),
        ({"start": 0.4}, "start=0.4 is after share=0.36"),
        ({"merge": "sum"}, "merge='sum'"),
        ({"background": (0, 0, 300)}, "background"),
        ({"regions": HALVES}, "as many"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        MultiInstanceSampler(**{"texts": [B], "regions": [FULL], **arguments})


def test_a_bare_denoiser_is_refused() -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    with pytest.raises(UnsupportedError, match="scheduler"):
        hookctl.control(pipe.unet, MultiInstanceSampler([B], [FULL])).__enter__()


# -- the embedded pipeline -------------------------------------------------------------------------


@pytest.mark.slow
def test_objects_are_drawn_in_their_regions() -> None:
    """Where red and blue are follows the regions, whichever way round; colours do not mix."""
    pipe = hookctl.load_shapes()
    phrases = [
        "a large red circle on a white background",
        "a large blue square on a white background",
    ]
    redder = []
    for halves in (HALVES, HALVES[::-1]):
        stack = (
            MultiInstanceSampler(
                phrases, halves, share=0.5, merge="paste", outside="", background=(255, 255, 255)
            ),
            RegionalPrompts(phrases, halves, base=0.5, start=0.5),
            MaskedSelfAttention(halves, open=True, start=0.5),
        )
        with hookctl.control(pipe, *stack):
            images = pipe(
                "a large red circle and a large blue square on a white background",
                num_images_per_prompt=2,
                num_inference_steps=8,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
        difference = images[:, 0] - images[:, 2]  # red less blue, [images, height, width]
        left, right = difference.chunk(2, dim=-1)
        redder.append(left.mean((1, 2)) - right.mean((1, 2)))
    assert redder[0].mean() > 0.1 and redder[1].mean() < -0.1
