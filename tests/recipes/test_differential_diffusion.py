"""Differential Diffusion: the official rule and diffusers' port, told literally, and the laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor

import hookctl
from hookctl import Editor, recipes
from hookctl.errors import ConflictError, InputError
from hookctl.loop.images import encode
from hookctl.recipes import DifferentialDiffusion, FreeU, MultiDiffusion
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.hookctl.loop.families import BY_NAME, FAMILIES
from tests.recipes.images import image
from tests.recipes.literal_flow import FlowMatchExact
from tests.recipes.runs import TWO, made, relative, with_scheduler
from tests.recipes.runs import draw_two as draw

SD15, FLUX = zoo.PIPELINES["sd15"], zoo.PIPELINES["flux"]
STEPS = 8
TOLERANCE = 1e-9  # float64


def ramp(height: int = 16, width: int = 16) -> Tensor:
    """How much is kept: every value but those at which a step begins."""
    values = torch.linspace(0.03, 0.97, height * width, dtype=torch.float64)
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))].reshape(
        height, width
    )


class Watch(Editor):
    """The latents after every step."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []

    def after(self, state: Any) -> None:
        self.latents.append(state.latents.clone())


# -- the published loops ---------------------------------------------------------------------------


def official(pipe: Any, keep: Tensor, start: Tensor, steps: int) -> Tensor:
    """exx8/differential-diffusion: the masked loop over image-to-image at strength 1."""
    text, other = pipe.encode_prompt(TWO, "cpu", 1, True, ["blurry"] * 2)
    source, scheduler = encode(pipe, image()), pipe.scheduler
    scheduler.set_timesteps(steps)
    noised = [scheduler.add_noise(source, start, t.reshape(1)) for t in scheduler.timesteps]
    masks = [keep > i / steps for i in range(steps)]
    x = start
    for i, t in enumerate(scheduler.timesteps):
        mask = masks[i].to(x)
        x = noised[0] if i == 0 else noised[i] * mask + x * (1 - mask)
        u, c = pipe.unet(torch.cat([x] * 2), t, torch.cat([other, text])).sample.chunk(2)
        x = scheduler.step(u + 4.0 * (c - u), t, x).prev_sample
    return x


def starts(shape: tuple[int, ...]) -> Tensor:
    return torch.cat(
        [
            torch.randn(1, *shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            for i in range(2)
        ]
    )


@torch.no_grad()
def test_it_is_the_official_loop() -> None:
    pipe = with_scheduler(DDIMScheduler).to(torch.float64)
    keep = ramp()
    keep[0], keep[-1] = 0.0, 1.0  # where ours differs from it
    want = official(pipe, keep, starts((4, 16, 16)), STEPS)
    edit = DifferentialDiffusion(image(), 1 - keep, paper=True)
    assert relative(draw(SD15, pipe, edit, steps=STEPS), want) < TOLERANCE
    plain = draw(SD15, pipe, steps=STEPS)
    assert relative(plain, want) > 0.1
    sane = draw(SD15, pipe, DifferentialDiffusion(image(), 1 - keep), steps=STEPS)
    assert 1e-3 < relative(sane, want) < relative(plain, want)


@torch.no_grad()
@pytest.mark.parametrize("later", [False, True], ids=["official", "diffusers' port"])
def test_packed_latents(later: bool) -> None:
    """FLUX.1's loop with a mask packed as its latents are; the port lets go a step later."""
    pipe = BY_NAME["flux"].make().to(torch.float64)
    pipe.scheduler = FlowMatchExact.from_config(pipe.scheduler.config)
    keep, watch = ramp(), Watch()
    draw(FLUX, pipe, watch, steps=STEPS, guidance=1.0)
    source, sigmas = encode(pipe, image()), pipe.scheduler.sigmas.double()
    channels = source.shape[-1] // 4
    mask = keep.expand(1, channels, 16, 16)
    mask = mask.reshape(1, channels, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 64, -1)
    noise: list[Tensor] = []
    want: list[Tensor] = []

    class Literal(Editor):
        """The rule inside of the pipeline's loop."""

        def before(self, state: Any) -> None:
            if not state.clock.step:
                noise[:] = [state.latents.clone()]

        def after(self, state: Any) -> None:
            i = state.clock.step
            if i < STEPS - 1:
                level = sigmas[i + 1] * noise[0] + (1 - sigmas[i + 1]) * source
                held = mask > (i if later else i + 1) / STEPS
                state.latents = torch.where(held, level, state.latents)

    want = [draw(FLUX, pipe, Literal(), steps=STEPS, guidance=1.0)]
    change = (1 - keep - (1 / STEPS if later else 0)).clamp(min=0)
    edit = DifferentialDiffusion(image(), change, paper=True)
    assert relative(draw(FLUX, pipe, edit, steps=STEPS, guidance=1.0), want[0]) < 1e-7
    assert relative(draw(FLUX, pipe, steps=STEPS, guidance=1.0), want[0]) > 0.1


def test_a_share_of_the_timesteps() -> None:
    """ComfyUI's rule: a place is free from where its change reaches t / t_0 on."""
    keep, watch = ramp(), Watch()
    pipe = made("sd3")
    edit = DifferentialDiffusion(image(), 1 - keep, by="timestep")
    zoo.PIPELINES["sd3"].run(pipe, TWO, steps=STEPS)
    times, sigmas = pipe.scheduler.timesteps.clone(), pipe.scheduler.sigmas.clone()
    draw(zoo.PIPELINES["sd3"], pipe, edit, watch, steps=STEPS)
    source = encode(pipe, image())
    noise = torch.cat([torch.randn(1, *source.shape[1:], generator=g) for g in seeds()])
    shares = []
    for i, x in enumerate(watch.latents[:-1]):
        level = sigmas[i + 1] * noise + (1 - sigmas[i + 1]) * source
        held = ((x - level).abs().amax(1) < 1e-5).all(0)
        assert torch.equal(held, (1 - keep).float() < times[i + 1] / times[0])
        shares.append(held.float().mean())
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(2)]


# -- laws ------------------------------------------------------------------------------------------


EACH = [
    pytest.param(one.name, marks=() if one.name in ("sd15", "flux") else pytest.mark.slow)
    for one in FAMILIES
]


def picture(name: str, pipe: Any) -> Any:
    """An image, or frames, of the size that a family's tiny pipeline draws."""
    given = BY_NAME[name].arguments()
    side = int(given.get("width", 128))
    one = image(size=(side, int(given.get("height", side))))
    return [one] * given["num_frames"] if given.get("num_frames") else one


@pytest.mark.parametrize("name", EACH)
def test_both_ends_in_every_family(name: str) -> None:
    """1 everywhere is the plain run, bit for bit; where it is 0 the image stays, bit for bit."""
    family = BY_NAME[name]
    pipe = family.make()
    scale = 2.0 if family.guides else 1.0
    plain, watch, given = family.drawn(pipe, scale), Watch(), picture(name, pipe)
    clean = encode(pipe, given)
    before = fingerprint(pipe)
    idle = DifferentialDiffusion(given, "full")
    assert idle.neutral()
    with hookctl.control(pipe, idle):
        assert torch.equal(family.drawn(pipe, scale), plain)
    with hookctl.control(pipe, DifferentialDiffusion(given, (0, 0, 0.5, 1)), watch) as session:
        half = family.drawn(pipe, scale)
    clean = clean.to(watch.latents[-1])
    same = (watch.latents[-1] == clean).float().mean()
    assert 0.49 < float(same) < 0.51  # the right half
    assert not torch.equal(half, plain) and "assigned the latents" in session.report()
    with hookctl.control(pipe, DifferentialDiffusion(given, "full", strength=0.0), watch):
        family.drawn(pipe, scale)
    assert torch.equal(watch.latents[-1], clean.expand(watch.latents[-1].shape))
    assert not differences(before, fingerprint(pipe))


def test_kept_places_are_the_levels_of_the_image() -> None:
    for scheduler in (DDIMScheduler, EulerDiscreteScheduler):
        pipe, watch = with_scheduler(scheduler), Watch()
        draw(SD15, pipe, DifferentialDiffusion(image(), "full", strength=0.0), watch, steps=4)
        source = encode(pipe, image())
        noise = torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in seeds()])
        for x, t in zip(watch.latents[:-1], pipe.scheduler.timesteps[1:], strict=True):
            level = pipe.scheduler.add_noise(source, noise, t.reshape(1))
            assert relative(x, level) < 1e-5


def test_strength_is_image_to_image() -> None:
    """One change for all is the pipeline's own image-to-image at that strength."""
    pipe = with_scheduler(DDIMScheduler)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    source = encode(pipe, image())
    pipe.scheduler.set_timesteps(8)
    start = pipe.scheduler.add_noise(source, noise, pipe.scheduler.timesteps[4:5])
    drawn = SD15.run(_from(other, start), TWO[:1], steps=8, image=start, strength=0.5, guidance=4.0)
    edit = DifferentialDiffusion(image(), "full", strength=0.5)
    with hookctl.control(pipe, edit):
        ours = SD15.run(pipe, TWO[:1], steps=8, guidance=4.0)
    assert relative(ours, drawn) < 1e-4


def _from(pipe: Any, start: Tensor) -> Any:
    """Image-to-image that starts from these latents, noised already."""
    pipe.prepare_latents = lambda *_, **__: start
    return pipe


def test_each_prompt_has_its_image_and_map() -> None:
    pipe, watch = made("sd15"), Watch()
    images = [image(0), image(1)]
    edit = DifferentialDiffusion(images, ["box:0,0,0.5,1", "box:0.5,0,1,1"])
    draw(SD15, pipe, edit, watch, n=2)
    last = watch.latents[-1]
    for i, (one, columns) in enumerate(zip(images, (slice(8, 16), slice(0, 8)), strict=True)):
        clean = encode(pipe, one)[..., columns].expand(2, -1, -1, -1)
        assert torch.equal(last[2 * i : 2 * i + 2, ..., columns], clean)


def test_image_to_image_with_a_seed() -> None:
    parts = made("sd15").components
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(
        InputError, match="StableDiffusionImg2ImgPipeline starts from an image.*see"
    ):
        hookctl.control(pipe, DifferentialDiffusion(image(), "full")).__enter__()
    watch = Watch()
    with hookctl.control(pipe, DifferentialDiffusion(image(), (0, 0, 0.5, 1), seed=3), watch):
        SD15.run(pipe, TWO, steps=4, image=[image(2)] * 2, strength=0.5)
    assert len(watch.latents) == 2
    clean = encode(pipe, image())
    assert torch.equal(watch.latents[-1][..., 8:], clean.expand(2, -1, -1, -1)[..., 8:])


def test_beside_tiles_and_others() -> None:
    pipe, watch = made("sd15"), Watch()
    edit = DifferentialDiffusion(image(), (0, 0, 0.5, 1))
    alone = draw(SD15, pipe, edit)
    both = draw(SD15, pipe, MultiDiffusion(tile=12, stride=4), edit, FreeU(), watch)
    assert relative(both, alone) > 1e-4
    assert torch.equal(
        watch.latents[-1][..., 8:], encode(pipe, image())[..., 8:].expand(2, 4, 16, 8)
    )


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"image": 3}, "DifferentialDiffusion: image"),
        ({"change": []}, r"change=\[\]; give a map"),
        ({"change": "nonsense"}, "DifferentialDiffusion: change"),
        ({"change": torch.zeros(4, 4)}, "DifferentialDiffusion: change|empty"),
        ({"strength": 1.5}, "DifferentialDiffusion: strength"),
        ({"by": "sigma"}, "DifferentialDiffusion: by='sigma'"),
    ],
)
def test_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        with hookctl.control(
            made("sd15"), DifferentialDiffusion(**{"image": image(), "change": "full"} | arguments)
        ):
            SD15.run(made("sd15"), TWO)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"image": image(size=(64, 64))}, r"latents are \(4, 8, 8\), and this run draws \(4, 16"),
        ({"image": [image()] * 3}, "image is for 3 prompts, but the pipeline draws 2"),
        ({"change": ["full"] * 3}, "change is for 3 prompts, but the pipeline draws 2"),
    ],
)
def test_other_runs(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        draw(
            SD15,
            made("sd15"),
            DifferentialDiffusion(**{"image": image(), "change": "full"} | arguments),
        )


def test_two_of_them_are_refused() -> None:
    edit = DifferentialDiffusion(image(), "full")
    with pytest.raises(ConflictError, match="both claim the latents.*join their maps"):
        hookctl.control(made("sd15"), edit, DifferentialDiffusion(image(), "full")).__enter__()


def test_a_bare_denoiser_is_refused() -> None:
    with pytest.raises(InputError, match="DifferentialDiffusion needs the pipeline"):
        hookctl.control(
            made("sd15").unet, recipes.DifferentialDiffusion(image(), "full")
        ).__enter__()
