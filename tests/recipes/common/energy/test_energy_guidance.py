"""Attend-and-Excite, BoxDiff and layout guidance: laws, formulas, cost, bad input, effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler

import hookctl
from hookctl.address.clock import Clock
from hookctl.address.regions import Region
from hookctl.address.rows import Row
from hookctl.errors import InputError, WordError
from hookctl.loop.energy import ImageMaps
from hookctl.loop.noise import Level
from hookctl.recipes.attend_and_excite import AttendAndExcite
from hookctl.recipes.box_diff import BoxDiff
from hookctl.recipes.common.energy.map_functions import smoothed
from hookctl.recipes.common.energy.word_energy import Subject
from hookctl.recipes.layout_guidance import LayoutGuidance
from tests import zoo

PROMPTS = ["a red cat above a blue square", "a blue dog"]
WORDS = [["cat", "square"], ["dog"]]
BOXES = [[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], [(0, 0, 0.01, 0.01)]]  # the last: less than a cell


def editors(**options: Any) -> list[Any]:
    """One of each, with few rounds of refinement."""
    return [
        AttendAndExcite(WORDS, refinements=2, **options),
        BoxDiff(WORDS, BOXES, refinements=2, **options),
        LayoutGuidance(WORDS, BOXES, iterations=2, stop=0.5, **options),
    ]


@pytest.mark.slow
def test_zero_scale_and_no_words_are_bit_identical() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    plain = case.run(pipe, PROMPTS)
    for one in [*editors(scale=0.0), AttendAndExcite([])]:
        with hookctl.control(pipe, one):
            assert torch.equal(case.run(pipe, PROMPTS), plain)
    for one in editors():
        with hookctl.control(pipe, one):
            moved = case.run(pipe, PROMPTS)
        assert torch.isfinite(moved).all() and not torch.equal(moved, plain)
    assert torch.equal(case.run(pipe, PROMPTS), plain)


@pytest.mark.slow
@pytest.mark.parametrize("paper", [False, True])
def test_images_do_not_depend_on_their_batch(paper: bool) -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    with hookctl.control(pipe, BoxDiff(WORDS, BOXES, paper=paper, refinements=2)):
        both = case.run(pipe, PROMPTS, n=2)
    with hookctl.control(pipe, BoxDiff(WORDS[0], BOXES[0], paper=paper, refinements=2)):
        alone = case.run(pipe, PROMPTS[:1], n=2)
    assert torch.allclose(both[:2], alone, atol=2e-3)


def image(maps: torch.Tensor) -> ImageMaps:
    """maps: [heads, height, width, tokens]"""
    site = hookctl.control(zoo.PIPELINES["sd15"].make()).sites[0]
    return ImageMaps(Row(0, "cond", 0, 0), torch.zeros(4, 8, 8), {site: maps[None]})


def test_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 6, 7, 5, generator=generator, dtype=torch.float64)
    maps = logits.softmax(-1)
    subjects = [
        Subject("a", (0,), Region.box(0, 0, 0.5, 0.5)),
        Subject("b", (2, 3), Region.box(0.5, 0.3, 1, 1)),
    ]
    masks = [s.region.tokens(6, 7).reshape(6, 7).double() for s in subjects]
    shown = image(maps)

    weights = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) / (2 * 0.5**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    p = (100 * maps.mean(0)).softmax(-1)
    drawn = [p[..., 0], p[..., 2] + p[..., 3]]
    soft = [
        F.conv2d(F.pad(m[None, None], (1,) * 4, "reflect"), kernel[None, None])[0, 0] for m in drawn
    ]
    excite = AttendAndExcite(["a", "b"]).energy(shown, subjects, "update")
    assert torch.allclose(excite, max(1 - m.max() for m in soft), atol=1e-7)

    total = 0.0
    for m, mask in zip(soft, masks, strict=True):
        inside, outside = (m * mask).flatten(), (m * (1 - mask)).flatten()
        count = [max(int(0.2 * float(k.sum())), 1) for k in (mask, 1 - mask)]
        total += 1 - inside.sort(descending=True).values[: count[0]].mean()
        total += outside.sort(descending=True).values[: count[1]].mean()
        for dim in (0, 1):
            want = mask.amax(dim)
            cells = want.nonzero().flatten().tolist()
            near = torch.zeros_like(want)
            for edge in (cells[0], cells[-1] + 1):
                for i in range(edge - 1, edge + 2):
                    if 0 <= i < len(near):
                        near[i] = 1
            total += ((m.amax(dim) - want).abs() * near).mean()
    assert torch.allclose(BoxDiff(["a", "b"], [s.region for s in subjects]).energy(
        shown, subjects, "update")[0], total, atol=1e-7)  # fmt: skip

    parts = []
    for s, mask in zip(subjects, masks, strict=True):
        tokens = [
            (1 - (maps[h, ..., t] * mask).sum() / maps[h, ..., t].sum()) ** 2
            for t in s.columns
            for h in range(2)
        ]
        parts.append(sum(tokens) / len(tokens))
    guidance = LayoutGuidance(["a", "b"], [s.region for s in subjects])
    found = guidance.energy(shown, subjects, "update")
    assert torch.allclose(found[1], sum(parts) / 2, atol=1e-10)
    assert torch.allclose(found[0], 30 * found[1])


def test_the_steps() -> None:
    clock, alpha, sigma = Clock(5, 11, 0.0), Level(0.6, 0.8), Level(1.0, 0.8 / 0.6)
    excite = AttendAndExcite(["a"])
    assert excite.step_size(clock, alpha) == pytest.approx(15)
    assert AttendAndExcite(["a"], paper=True).step_size(clock, alpha) == pytest.approx(
        20 * 0.75**0.5
    )
    # The same move of the same latents in both spaces: rho x / r has the gradient r grad_x.
    assert excite.step_size(clock, sigma) == pytest.approx(15 / 0.6**2)
    layout = LayoutGuidance(["a"], [(0, 0, 1, 0.5)])
    assert layout.step_size(clock, sigma) == pytest.approx(sigma.noise**2)
    assert layout.step_size(clock, alpha) == pytest.approx(1 - 0.6**2)
    paper = BoxDiff(["a"], [(0, 0, 1, 0.5)], paper=True)
    point = torch.zeros(1, 5, 5)
    point[0, 2, 2] = 1
    assert smoothed(point, paper.sigma)[0, 2, 2] == pytest.approx(0.576**2, abs=1e-3)
    assert smoothed(point, excite.sigma)[0, 2, 2] == pytest.approx(0.787**2, abs=1e-3)


@pytest.mark.slow
def test_cost() -> None:
    """Each step of the window: one partial call; a refinement one more for each step and a last."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    calls: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    one = AttendAndExcite(WORDS, thresholds={}, refinements=5)
    with hookctl.control(pipe, one):
        case.run(pipe, PROMPTS, steps=4)
    assert [step for step, _ in one.record] == [0, 1]
    assert len(calls) == 4 + 2
    calls.clear()
    one = LayoutGuidance(WORDS, BOXES, threshold=0.0, iterations=3, stop=0.5)
    with hookctl.control(pipe, one):
        case.run(pipe, PROMPTS, steps=4)
    handle.remove()
    assert len(calls) == 4 + 2 * 3


@pytest.mark.slow
def test_paper_layout_guidance_stops_for_good() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    one = LayoutGuidance(WORDS, BOXES, threshold=10.0, stop=1.0, paper=True)
    with hookctl.control(pipe, one):
        case.run(pipe, PROMPTS, steps=3)
    assert [step for step, _ in one.record] == [0]  # a step before it looks, then never again
    one = LayoutGuidance(WORDS, BOXES, threshold=10.0, stop=1.0)
    with hookctl.control(pipe, one):
        guided = case.run(pipe, PROMPTS, steps=3)
    assert [step for step, _ in one.record] == [0, 1, 2]  # it looks, and moves nothing
    assert torch.equal(guided, case.run(pipe, PROMPTS, steps=3))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "pixart"])
def test_other_families(family: str) -> None:
    case = zoo.PIPELINES[family]
    pipe = case.make()
    with hookctl.control(pipe, LayoutGuidance(["cat"], [(0, 0, 0.5, 1)], iterations=1, stop=0.5)):
        assert torch.isfinite(case.run(pipe, PROMPTS[:1])).all()


def test_the_energy_falls_in_sigma_space_too() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    one = LayoutGuidance(["cat"], [(0, 0, 0.5, 1)], scale=0.3, threshold=0.0, stop=0.5)
    with hookctl.control(pipe, one):
        case.run(pipe, PROMPTS[:1])
    values = [float(v) for step, v in one.record if step == 0]
    assert values[-1] < values[0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AttendAndExcite(["a"], scale=-1), "scale=-1"),
        (lambda: AttendAndExcite("a"), "words"),
        (lambda: AttendAndExcite(["a"], thresholds={2.0: 0.5}), "thresholds"),
        (lambda: BoxDiff(["a"], []), "as many"),
        (lambda: BoxDiff(["a"], [(0, 0, 0, 1)]), "x0 < x1"),
        (lambda: BoxDiff(["a"], [(0, 0, 1, 1)], reach=-1), "reach=-1"),
        (lambda: LayoutGuidance(["a"], [(0, 0, 1, 1)], form="x"), "top-k"),  # type: ignore[arg-type]
        (lambda: LayoutGuidance(["a"], [(0, 0, 1, 1)], iterations=0), "iterations=0"),
    ],
)
def test_bad_arguments(make: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()


def test_bad_runs() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    with pytest.raises(WordError, match="horse"), hookctl.control(pipe, AttendAndExcite(["horse"])):
        case.run(pipe, PROMPTS[:1])
    with (
        pytest.raises(InputError, match="2 prompts"),
        hookctl.control(pipe, AttendAndExcite(WORDS)),
    ):
        case.run(pipe, PROMPTS[:1])
    with pytest.raises(InputError, match="bare denoiser"):
        hookctl.control(pipe.unet, AttendAndExcite(["cat"])).__enter__()


# -- the embedded pipeline -------------------------------------------------------------------------


Drawn = tuple[torch.Tensor, float]


def drawn(pipe: Any, *edits: hookctl.Editor) -> Drawn:
    """The mean map of the circle in two images, and how much redder they are on the left."""
    with hookctl.control(pipe, *edits, hookctl.Maps("circle", start=0.5)) as session:
        images = pipe(
            "a large red circle on a white background",
            num_images_per_prompt=2,
            num_inference_steps=8,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
    maps = [session.maps["circle"].where(image=i).mean() for i in range(2)]
    left, right = (images[:, 0] - images[:, 2]).chunk(2, dim=-1)
    return torch.stack(maps).mean(0), float((left - right).mean())


@pytest.mark.long  # an energy a step
def test_attention_and_objects_go_where_the_boxes_are() -> None:
    pipe = hookctl.load_shapes()
    plain, side = drawn(pipe)
    sides = {}
    for box in ((0.1, 0.3, 0.5, 0.7), (0.5, 0.3, 0.9, 0.7)):
        inside = Region.box(*box).tokens(*plain.shape).view_as(plain)
        # BoxDiff's published fifth of a box is two cells of this one.
        for method, own, least in ((LayoutGuidance, {}, 1.5), (BoxDiff, {"top": 0.5}, 1.2)):
            edited, sides[method, box] = drawn(
                pipe, method(["circle"], [box], scale=60.0, stop=0.5, **own)
            )
            before, after = (float(m[inside].sum() / m.sum()) for m in (plain, edited))
            assert after > least * before, (method, box)
    left, right = (sides[LayoutGuidance, box] for method, box in sides if method is LayoutGuidance)
    assert left - right > 0.1 and left >= side >= right


def test_thresholds_that_fall_on_one_step_are_all_met() -> None:
    """0, 1/5 and 2/5 of four steps are the steps 0, 0 and 1."""
    edit = AttendAndExcite(["cat"])
    bounds = [edit.refinement(Clock(step, 4, 1.0))[0] for step in range(3)]
    assert bounds == pytest.approx([1 - 0.5, 1 - 0.8, 0])
