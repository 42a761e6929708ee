"""SAG: against a literal loop with explicit attention matrices in float64, and the laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes import PAG, SAG, SEG, FreeU
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.hookctl.drawing import editor
from tests.recipes.runs import TWO
from tests.recipes.runs import draw_two as draw

SD15 = zoo.PIPELINES["sd15"]
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


class Calls(Editor):
    """The rows of every call of the denoiser, those that other editors make included."""

    sites = "self mid"

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def attention(self, call: Any) -> None:
        self.rows.append([row.branch for row in call.rows])


# -- the published form ----------------------------------------------------------------------------


def literal(pipe: Any, start: Tensor, steps: int, guidance: float, scale: float) -> Tensor:
    """The loop of the published pipeline, with the map of the middle block written out."""
    attention, seen = pipe.unet.get_submodule(MID), {}
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
        for name in ("to_q", "to_k")
    ]
    cond, uncond = pipe.encode_prompt(TWO, "cpu", 1, True, ["blurry"] * 2)
    pipe.scheduler.set_timesteps(steps)
    x, guided = start * pipe.scheduler.init_noise_sigma, guidance > 1
    for t in pipe.scheduler.timesteps:
        a = pipe.scheduler.alphas_cumprod[t]
        text = torch.cat([uncond, cond]) if guided else cond
        eps = pipe.unet(torch.cat([x] * (1 + guided)), t, text).sample[:2]
        both = pipe.unet(torch.cat([x] * (1 + guided)), t, text).sample
        q, k = (z[:2].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for z in seen.values())
        received = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(1).sum(1)
        mask = F.interpolate((received > 1.0).double().reshape(2, 1, 2, 2), size=(16, 16))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        at = torch.arange(-4.0, 5).double()
        kernel = torch.exp(-0.5 * at**2)
        kernel = kernel / kernel.sum()
        kernel = (kernel[:, None] * kernel).expand(4, 1, 9, 9)
        blurred = F.conv2d(F.pad(x0, [4] * 4, mode="reflect"), kernel, groups=4)
        degraded = a.sqrt() * (blurred * mask + x0 * (1 - mask)) + (1 - a).sqrt() * eps
        again = pipe.unet(degraded, t, uncond if guided else cond).sample
        total = both[:2] + guidance * (both[2:] - both[:2]) if guided else both
        total = total + scale * (eps - again)
        x = pipe.scheduler.step(total, t, x).prev_sample
    for handle in handles:
        handle.remove()
    return x


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [4.0, 1.0])
@torch.no_grad()
def test_the_published_loop(guidance: float) -> None:
    pipe = SD15.make().to(torch.float64)
    start = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    want = literal(pipe, start, 3, guidance, 0.75)
    sag = SAG()
    got = draw(SD15, pipe, sag, steps=3, guidance=guidance, latents=start)
    assert error(got, want) < 1e-8
    assert error(got, SD15.run(pipe, TWO, steps=3, guidance=guidance, latents=start)) > 1e-4
    assert sag.masks.shape == (2, 16, 16)
    assert 0 < sag.masks.mean() < 1


@pytest.mark.skipif("z_image" not in zoo.PIPELINES, reason="this diffusers lacks Z-Image")
def test_on_a_flow_by_hand() -> None:
    """The flow's image is blurred where it is looked at, mixed again and predicted from again."""
    case, scale, kept = zoo.PIPELINES["z_image"], 0.75, list[Any]()
    pipe = case.make()
    sag = SAG(scale, sites="noise_refiner*")

    def keep(predictions: Any) -> Tensor:
        kept.append(predictions)
        return predictions.guided

    got = draw(case, pipe, editor(combine=keep), sag, editor(combine=keep), steps=3, guidance=4.0)
    assert error(got, case.run(pipe, TWO, steps=3, guidance=4.0)) > 1e-5
    before, after = kept[-2:]
    state, v, x = before.state, before["uncond"], before.state.latents
    sigma = float(pipe.scheduler.sigmas[2])
    x0, eps = x - sigma * v, x + (1 - sigma) * v
    n = x.shape[-1] - (x.shape[-1] % 2 == 0)  # the kernel is no longer than the side
    at = torch.arange(-(min(9, n) // 2), min(9, n) // 2 + 1.0)
    kernel = torch.exp(-0.5 * at**2) / torch.exp(-0.5 * at**2).sum()
    window = (kernel[:, None] * kernel).expand(x.shape[1], 1, -1, -1)
    padded = F.pad(x0, [len(at) // 2] * 4, mode="reflect")
    blurred = F.conv2d(padded, window, groups=x.shape[1])
    mask = sag.masks[:, None]
    assert 0 < float(mask.mean()) < 1
    worse = (1 - sigma) * (blurred * mask + x0 * (1 - mask)) + sigma * eps
    model, texts = pipe.transformer, state.kwargs["cap_feats"][2:]
    with torch.no_grad():
        out = type(model).forward(
            model, list(worse.unsqueeze(2)), torch.full((2,), 1 - sigma), texts, return_dict=False
        )
    again = -torch.stack(out[0]).squeeze(2)
    new = x + (1 - sigma) * before.guided + scale * (eps - worse - (1 - sigma) * again)
    assert error(after.guided, new - (x - sigma * new) / (1 - sigma)) < 1e-4


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in ("sd15", "sdxl", "sd3", "pixart", "z_image") if n in zoo.PIPELINES]
)
def test_nothing_to_do(name: str) -> None:
    """Scale 0 or no window: bit for bit. Nothing salient: nothing is blurred or changed."""
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, TWO)
    before = fingerprint(pipe)
    for idle in (SAG(0.0), SAG(start=0.5, stop=0.5)):
        calls = Calls()
        assert torch.equal(draw(case, pipe, idle), plain)
    assert error(draw(case, pipe, SAG(threshold=1e6)), plain) < 1e-4
    assert error(draw(case, pipe, SAG()), plain) > 1e-4
    assert not differences(before, fingerprint(pipe))
    assert torch.equal(case.run(pipe, TWO), plain), calls


def test_one_further_call_of_the_unconditional_rows() -> None:
    for guidance, branch in ((4.0, "uncond"), (1.0, "cond")):
        calls = Calls()
        draw(SD15, SD15.make(), SAG(), calls, steps=2, guidance=guidance)
        own = (["uncond"] * 2 if guidance > 1 else []) + ["cond"] * 2
        assert calls.rows == [own, [branch] * 2] * 2


def test_guidance_by_two_calls() -> None:
    """The map is that of the unconditional call, which comes last."""
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    with pytest.raises(UnsupportedError, match=r"latents of WanPipeline are \(2, 4, 3, 8, 8\)"):
        draw(zoo.PIPELINES["wan"], zoo.PIPELINES["wan"].make(), SAG())
    assert error(draw(case, pipe, SAG()), case.run(pipe, TWO)) > 1e-4


@pytest.mark.slow
def test_spaces_of_schedulers_agree() -> None:
    """From one image and one noise, latents in sigma space get the same guidance."""
    common = {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"}
    a = DDIMScheduler(**common).alphas_cumprod[501]
    # Of no image: Euler's pipeline multiplies by sqrt(sigma^2 + 1), which is 1 / sqrt(a).
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)) * (1 - a).sqrt()
    results: list[Tensor] = []

    class Keep(Editor):
        stop = 0.5

        def combine(self, predictions: Any) -> Tensor:
            results.append(predictions.guided)
            return predictions.guided

    for scheduler in (DDIMScheduler, EulerDiscreteScheduler):
        pipe = SD15.make()
        pipe.scheduler = scheduler(**common)
        draw(SD15, pipe, SAG(), Keep(), latents=start)
        draw(SD15, pipe, Keep(), latents=start)
    assert error(results[0], results[2]) < 1e-4
    assert error(results[0] - results[1], results[2] - results[3]) < 1e-3
    assert error(results[0], results[1]) > 1e-3


@pytest.mark.slow
def test_together_with_the_others() -> None:
    pipe = SD15.make()
    editors = [PAG(2.0), SEG(1.0), SAG(), FreeU()]
    everything = draw(SD15, pipe, *editors)
    for i in range(len(editors)):
        rest = editors[:i] + editors[i + 1 :]
        assert error(everything, draw(SD15, pipe, *rest)) > 1e-4, editors[i].name


def test_bad_input() -> None:
    for given, match in (
        ({"scale": -1.0}, "SAG: scale"),
        ({"threshold": "1"}, "SAG: threshold"),
        ({"sigma": math.inf}, "SAG: sigma"),
        ({"kernel": 8}, "SAG: kernel"),
    ):
        with pytest.raises(InputError, match=match):
            SAG(**given)
    with pytest.raises(InputError, match="control the pipeline itself"):
        hookctl.control(SD15.make().unet, SAG()).__enter__()
    flux = zoo.PIPELINES["flux"]
    with pytest.raises(UnsupportedError, match="latents of FluxPipeline"):
        draw(flux, flux.make(), SAG())


def test_a_step_of_pure_noise_leaves_nothing_behind() -> None:
    """A flow's first step has no image to blur: what its attention looked at is not the next's."""
    case = zoo.PIPELINES["sd3"]
    masks, drawn = [], []
    for start in (0.0, 1 / 3):
        edit, pipe = SAG(1.0, start=start, stop=2 / 3, threshold=0.9), case.make()
        with hookctl.control(pipe, edit):
            drawn.append(case.run(pipe, steps=3))
        masks.append(edit.masks)
    assert masks[0] is not None and torch.equal(*masks)
    assert torch.equal(*drawn)
