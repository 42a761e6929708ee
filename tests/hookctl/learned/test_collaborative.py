"""Collaborative Diffusion: hand-driven loops, the official sampling loop, maps, identities, bad
input."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

import hookctl
from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator
from hookctl.learned.collaborative.influence import led, shares_of
from tests import zoo
from tests.recipes.runs import SD15, relative
from tests.recipes.test_real_compo import other

PROMPTS = ["a red cat", "a blue dog"]


def network(seed: int, scale: float = 1.0) -> Any:
    """A dynamic diffuser; scale 0 is the zero-initialised one that training starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=32,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()
        with torch.no_grad():
            unet.conv_out.weight.mul_(8 * scale)
            unet.conv_out.bias.mul_(scale)
    return unet


def tokens(seed: int, images: int = 1) -> Tensor:
    return torch.randn(images, 5, 32, generator=torch.Generator().manual_seed(seed))


def certain(sure: bool) -> Callable[..., Tensor]:
    return lambda x, t, c: torch.full_like(x[:, :1], math.inf if sure else 0.0)


def draw(pipe: Any, *editors: Any, prompts: Any = PROMPTS, **call: Any) -> Tensor:
    with hookctl.control(pipe, *editors):
        return SD15.run(pipe, prompts, **call)


def in_double(pipe: Any) -> Any:
    pipe = pipe.to(torch.float64)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        setattr(pipe.scheduler, name, getattr(pipe.scheduler, name).double())
    return pipe


# -- loops by hand ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_zero_initialised_maps_are_the_plain_mean() -> None:
    """Bit for bit a loop by hand, each model guided by itself."""
    pipe = SD15.make()
    second, condition, negative = other(pipe), tokens(1), tokens(2)
    edit = CollaborativeDiffusion(
        [
            Collaborator("text", network(1, 0.0)),
            Collaborator("mask", network(2, 0.0), second, condition, negative),
        ]
    )
    got = draw(pipe, edit, steps=3)
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True, ["blurry"] * 2)
    pipe.scheduler.set_timesteps(3)
    noises = [
        torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    x = torch.cat(noises)
    text = torch.cat([uncond, cond])
    mask = torch.cat([negative.expand(2, -1, -1), condition.expand(2, -1, -1)])
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            guided = []
            for unet, c in ((pipe.unet, text), (second, mask)):
                u, p = unet(torch.cat([x, x]), t, c).sample.chunk(2)
                guided.append(u + SD15.guidance * (p - u))
            x = pipe.scheduler.step(0.5 * guided[0] + 0.5 * guided[1], t, x).prev_sample
    assert torch.equal(got, x)
    assert edit.influence.of(1).shape == (3, 2, 16, 16)
    assert bool((edit.influence.of(0) == 0.5).all())


class OfficialLoop:
    """The published sampler for two modalities, of one image: DDIM with eta, no guidance, the mask
    leading by a cosine and a factor of 2. Nothing here is shared with the library."""

    def __init__(self, alphas: Tensor, steps: int) -> None:
        stride = 1000 // steps
        times = [t + 1 for t in range(0, 1000, stride)]
        before = [0, *times[:-1]]
        self.schedule = [
            (t, float(alphas[t]), float(alphas[p])) for t, p in zip(times, before, strict=True)
        ][::-1]

    @torch.no_grad()
    def run(self, models: Any, networks: Any, conditions: Any, seed: int) -> tuple[Tensor, Any]:
        """models, networks, conditions: by "mask" and "text"."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((1, 4, 16, 16), generator=generator, dtype=torch.float64)
        kept = []
        for t, a, a_before in self.schedule:
            eps = {k: models[k](x, t, conditions[k]).sample for k in models}
            raw = {k: networks[k](x, t, conditions[k]).sample for k in models}
            total = sum(value.exp() for value in raw.values())
            share = {k: value.exp() / total for k, value in raw.items()}
            decay = 0.5 * (1 + math.cos(math.pi * (1 - t / 1000)))
            m = share["mask"] * decay
            weights = {"mask": 2 * m / (1 + m), "text": (1 - m) / (1 + m)}
            kept.append(torch.cat([weights["mask"], weights["text"]], 1)[0])
            e = sum(weights[k] * eps[k] for k in models)
            clean = (x - (1 - a) ** 0.5 * e) / a**0.5
            sigma = ((1 - a_before) / (1 - a) * (1 - a / a_before)) ** 0.5  # eta = 1
            direction = (1 - a_before - sigma**2) ** 0.5 * e
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = a_before**0.5 * clean + direction + sigma * noise
        return x, torch.stack(kept)


@pytest.mark.slow
def test_paper_is_the_official_sampling_loop() -> None:
    """In float64; each image of a batch as if alone, whatever the order of the models."""
    pipe = in_double(SD15.make())
    second, steps = other(pipe), 5
    of_mask, of_text = network(1).double(), network(2).double()
    condition = tokens(3, 2).double()
    mask = Collaborator("mask", of_mask, second, condition)
    text = Collaborator("text", of_text)
    call: dict[str, Any] = {"steps": steps, "guidance": 1.0, "eta": 1.0}
    edit = CollaborativeDiffusion([text, mask], paper=True, leader="mask")
    got = draw(pipe, edit, **call)
    plain = draw(pipe, CollaborativeDiffusion([text, mask]), **call)
    texts, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    loop = OfficialLoop(pipe.scheduler.alphas_cumprod, steps)
    for i in range(2):
        conditions = {"mask": condition[i : i + 1], "text": texts[i : i + 1]}
        models = {"mask": second, "text": pipe.unet}
        want, maps = loop.run(models, {"mask": of_mask, "text": of_text}, conditions, seed=i)
        assert relative(got[i], want[0]) < 1e-10
        assert relative(edit.influence.of(i).flip(1), maps) < 1e-10
    assert relative(plain, got) > 1e-3


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_infinite_logit_is_that_model_alone() -> None:
    """Bit for bit what it draws, be it the pipeline's own, another denoiser or a pipeline."""
    pipe, beside = SD15.make(), SD15.make()
    beside.unet = second = other(pipe)
    wanted = {"own": draw(pipe), "denoiser": draw(beside), "pipeline": draw(beside)}
    models = {"own": None, "denoiser": second, "pipeline": beside}
    for alone, want in wanted.items():
        edit = CollaborativeDiffusion(
            [Collaborator(name, certain(name == alone), model) for name, model in models.items()]
        )
        assert torch.equal(draw(pipe, edit), want), alone
        assert bool((edit.influence[alone] == 1).all())
    assert not torch.equal(wanted["own"], wanted["denoiser"])
    assert torch.equal(draw(pipe), wanted["own"])
    assert not [t for t in threading.enumerate() if t.name.endswith(" model")]


@pytest.mark.slow
def test_strength_0_and_one_model_are_the_plain_pipeline() -> None:
    pipe = SD15.make()
    plain, second = draw(pipe), other(pipe)
    idle = CollaborativeDiffusion([Collaborator("mask", network(1), second)], strength=0.0)
    assert torch.equal(draw(pipe, idle), plain)
    assert torch.equal(draw(pipe, CollaborativeDiffusion([Collaborator("text")])), plain)
    mask = Collaborator("mask", None, second)
    half, whole = (
        draw(pipe, CollaborativeDiffusion([mask], strength=s), steps=1) for s in (0.5, 1.0)
    )
    one = draw(pipe, steps=1)
    assert relative(half, (one + whole) / 2) < 1e-4 < relative(whole, one)


@pytest.mark.slow
def test_maps_sum_to_one_and_are_kept_by_step() -> None:
    pipe = SD15.make()
    models = [
        Collaborator("text", network(1)),
        Collaborator("mask", network(2), other(pipe), tokens(1)),
        Collaborator("again", network(3), None, tokens(2), tokens(3)),
    ]
    edit = CollaborativeDiffusion(models, start=0.25, stop=0.75)
    draw(pipe, edit, steps=4)
    maps = edit.influence
    assert maps.steps == [1, 2] and maps.of(1).shape == (2, 3, 16, 16)
    assert torch.allclose(maps.of(0).sum(1), torch.ones(2, 16, 16), atol=1e-6)
    assert float(maps.of(0).std()) > 1e-2 and not torch.equal(maps.of(0), maps.of(1))
    assert torch.equal(maps["again"][:, 1], maps.of(1)[:, 2])
    assert maps.sheet().width > 2 * 128
    with pytest.raises(InputError, match="no model 'sketch'; there are text, mask, again"):
        maps["sketch"]
    with pytest.raises(InputError, match="image=2; the run drew 2"):
        maps.of(2)


def test_the_own_denoiser_asked_again_is_the_pipeline_under_that_condition() -> None:
    pipe = SD15.make()
    condition, negative = tokens(1, 2), tokens(2, 2)
    want = pipe(
        prompt_embeds=condition, negative_prompt_embeds=negative, num_inference_steps=2,
        guidance_scale=SD15.guidance, generator=_generators(), output_type="latent",
    ).images  # fmt: skip
    edit = CollaborativeDiffusion([Collaborator("again", None, None, condition, negative)])
    assert relative(draw(pipe, edit), want) < 1e-5


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(2)]


def test_led_for_two_and_more() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for leader in range(3):
        assert torch.allclose(led(logits, leader, 0.3).sum(1), torch.ones(2, 4, 4).double())
    first, last = led(logits, 1, 1.0), led(logits, 1, 0.0)
    share = shares_of(logits)[:, 1]
    assert torch.allclose(first[:, 1], 2 * share / (1 + share))
    far = led(logits, 1, 1.0, factor=100.0)[:, 1]
    assert torch.allclose(far, 100 * share / (1 + 99 * share)) and bool((far > first[:, 1]).all())
    assert float(last[:, 1].abs().max()) < 1e-12
    assert torch.allclose(last[:, [0, 2]], shares_of(logits[:, [0, 2]]))


@pytest.mark.slow
def test_a_pipeline_begins_late_and_ends_early() -> None:
    pipe, beside = SD15.make(), SD15.make()
    beside.unet = other(pipe)
    mixed = CollaborativeDiffusion(
        [Collaborator("text"), Collaborator("mask", None, beside)], start=0.25, stop=0.75
    )
    bare = CollaborativeDiffusion(
        [Collaborator("text"), Collaborator("mask", None, beside.unet)], start=0.25, stop=0.75
    )
    with hookctl.control(pipe, mixed):
        got = SD15.run(pipe, PROMPTS, steps=4)
        assert not [t for t in threading.enumerate() if t.name.endswith(" model")]
    assert relative(got, draw(pipe, bare, steps=4)) < 1e-5
    prompted = Collaborator("mask", None, beside, arguments={"prompt": PROMPTS[::-1]})
    turned = CollaborativeDiffusion([Collaborator("text"), prompted], start=0.25, stop=0.75)
    assert relative(draw(pipe, turned, steps=4), got) > 1e-4


@pytest.mark.slow
def test_other_schedulers_and_editors_beside() -> None:
    from hookctl.recipes import FreeU

    pipe = SD15.make()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    second = other(pipe)
    alone = SD15.make()
    alone.unet, alone.scheduler = second, pipe.scheduler
    edit = CollaborativeDiffusion(
        [Collaborator("text", certain(False)), Collaborator("mask", certain(True), second)]
    )
    assert torch.equal(draw(pipe, edit), draw(alone))
    want, plain = draw(alone, FreeU()), draw(alone)
    with hookctl.control(second, FreeU()):
        assert relative(draw(pipe, edit), want) < 1e-5 < relative(plain, want)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "controlnet", "wan"])
def test_other_families(family: str) -> None:
    """Further conditions reach every model; guidance in one call or in two."""
    case = zoo.PIPELINES[family]
    pipe, alone = case.make(), case.make()
    second = copy.deepcopy(case.denoiser_of(pipe))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.05)
    setattr(alone, case.denoiser, second)
    for sure in (True, False):
        edit = CollaborativeDiffusion(
            [Collaborator("own", certain(not sure)), Collaborator("other", certain(sure), second)]
        )
        want = case.run(alone if sure else pipe)
        with hookctl.control(pipe, edit):
            assert relative(case.run(pipe), want) < 1e-5
    assert relative(case.run(alone), case.run(pipe)) > 1e-3


# -- bad input -------------------------------------------------------------------------------------


def refused(match: str, edit: Callable[[], Any], pipe: Any = None) -> None:
    """With an error before the denoiser is called."""
    pipe = pipe or SD15.make()
    called: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda *_: called.append(1))
    try:
        with pytest.raises(InputError, match=match):
            draw(pipe, edit())
    finally:
        hook.remove()
    assert not called


def one(*given: Any, **more: Any) -> Callable[[], Any]:
    return lambda: CollaborativeDiffusion([Collaborator("mask", *given, **more)])


@pytest.mark.slow
def test_bad_input() -> None:
    pipe = SD15.make()
    refused(
        r"influence of 'mask' returned \(2, 1, 8, 8\) for latents \(2, 4, 16, 16\)",
        one(lambda x, t, c: x[:, :1, ::2, ::2]),
    )
    refused(r"influence of 'mask' returned \(2, 4, 16, 16\)", one(lambda x, t, c: x))
    refused("influence of 'mask' returned str", one(lambda x, t, c: "x"))
    refused("influence has 4 output channels", one(other(pipe)))
    refused("model is a str; give None", one(None, "x"))
    refused("the pipeline's own denoiser", one(None, pipe.unet), pipe)
    refused("the controlled pipeline itself", one(None, pipe), pipe)
    refused("float64, and the pipeline's is in torch.float32", one(None, other(pipe).double()))
    refused(r"condition is \(5, 32\)", one(None, None, tokens(1)[0]))
    refused(
        r"takes a condition of 32 channels, and it is given \(2, 5, 48\)",
        one(network(1), None, torch.zeros(1, 5, 48)),
    )
    refused("condition is for 3 images and the run draws 2", one(None, None, tokens(1, 3)))
    refused("negative is given without condition", one(None, None, None, tokens(1)))
    refused("arguments are of a pipeline's call", one(arguments={}))
    refused("'latents' is set by the mixture", one(None, SD15.make(), arguments={"latents": None}))
    refused("conditioned through its call", one(None, SD15.make(), tokens(1)))
    narrow = UNet2DConditionModel(**{**network(1).config, "in_channels": 3})
    refused("influence takes latents of 3 channels", one(narrow))
    late = SD15.make()
    late.scheduler = type(late.scheduler).from_config(late.scheduler.config, steps_offset=0)
    refused("give both one scheduler", one(None, late))
    small = SD15.make()
    small.unet = UNet2DConditionModel(**{**small.unet.config, "in_channels": 3, "out_channels": 3})
    for other_latents in (small, small.unet):
        refused(r"takes latents of 3 channels and the pipeline draws", one(None, other_latents))


def test_bad_arguments() -> None:
    with pytest.raises(UnsupportedError, match="control its pipeline"):
        hookctl.control(
            SD15.make().unet, CollaborativeDiffusion([Collaborator("text")])
        ).__enter__()
    text, mask = Collaborator("text"), Collaborator("mask")
    for match, given in (
        ("give a list of Collaborator", {"models": []}),
        (r"models\[0\]='x'; give Collaborator", {"models": ["x"]}),
        ("give each its own name", {"models": [text, text]}),
        ("leader='mask'; give one of text", {"models": [text], "leader": "mask"}),
        ("paper=True is of one model and the rest", {"models": [text], "paper": True}),
        ("strength=2", {"models": [text], "strength": 2.0}),
        ("factor=5.0 is of the schedule of paper=True", {"models": [text], "factor": 5.0}),
        ("factor=0", {"models": [text, mask], "factor": 0, "paper": True}),
        ("start=0.5, stop=0.2", {"models": [text], "start": 0.5, "stop": 0.2}),
    ):
        with pytest.raises(InputError, match=match):
            CollaborativeDiffusion(**given)
