"""APG, CFGZeroStar, TCFG and FDG where a family makes something of its guided sum, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)
from torch import Tensor

import hookctl
from hookctl.errors import UnsupportedError
from hookctl.loop.packing import packed, unpacked
from hookctl.recipes import APG, FDG, TCFG, CFGZeroStar
from hookctl.recipes.common.guidance_rule import Guided
from hookctl.recipes.fdg import pyramid, summed
from tests import zoo
from tests.families.subjects import error
from tests.recipes.rules import RULES, Watch
from tests.recipes.runs import TWO, draw_two, made
from tests.zoo.wild import WILD

QWEN, Z_IMAGE = zoo.PIPELINES["qwen_image"], zoo.PIPELINES["z_image"]


class OfFrequencies:
    """FDG's sum over the grids of a family's latents, [images, channels, height, width]."""

    def __init__(self, scales: tuple[float, float], pipe: Any, cells: tuple[int, int]) -> None:
        self.scales, self.pipe, self.cells = scales, pipe, cells

    def set_state(self, *_: Any) -> None: ...

    def prepare_inputs(self, *_: Any) -> None: ...

    def forward(self, c: Tensor, u: Tensor) -> Any:
        grids = [unpacked(self.pipe, x, self.cells) for x in (c, u)]
        levels = [pyramid(x, 2) for x in grids]
        mixed = [v + g * (w - v) for g, w, v in zip(self.scales, *levels, strict=True)]
        self.pred = summed(mixed)
        if c.dim() == 3:
            self.pred = packed(self.pipe, self.pred)
        return self


def pairs(pipe: Any, g: float) -> list[tuple[Any, Any, float]]:
    """(rule, guider, tolerance); diffusers computes some in float32."""
    zero = ClassifierFreeZeroStarGuidance(g, 0)
    adaptive = AdaptiveProjectedGuidance(g, -0.5, 2.0, eta=0.0)
    return [
        (APG(0.0, -0.5, 2.0, space="prediction"), adaptive, 1e-10),
        (CFGZeroStar(0), zero, 5e-5),
        (TCFG(), TangentialClassifierFreeGuidance(g), 5e-5),
        (FDG((6.0, 3.0)), OfFrequencies((6.0, 3.0), pipe, (8, 8)), 1e-10),
    ]


def check(case: Any, name: str, g: float, finish: Any, **call: Any) -> None:
    """Step by step: the guider's sum, then what the family makes of it."""
    pipe = made(name, torch.float64)
    for rule, guider, tolerance in pairs(pipe, g):
        before, after = Watch(), Watch()
        draw_two(case, pipe, before, rule, after, steps=3, **call)
        plain = 0.0
        for i, ((parts, own), (_, got)) in enumerate(zip(before.steps, after.steps, strict=True)):
            c, u = parts["cond"].double(), parts["uncond"].double()
            guider.set_state(i, 3, torch.tensor(0))
            guider.prepare_inputs({"x": (c, u)})
            assert error(own, finish(u + g * (c - u), c)) < 1e-5
            want = finish(guider.forward(c, u).pred, c)
            assert error(got, want) < max(tolerance, 1e-6 if got.dtype == torch.float32 else 0)
            plain = max(plain, error(own, want))
        assert plain > 1e-4, type(rule).__name__


@pytest.mark.slow
def test_qwen_before_its_norms() -> None:
    """q |c| / |q| token by token, of the rule's q."""

    def finish(q: Tensor, c: Tensor) -> Tensor:
        return q * (c.norm(dim=-1, keepdim=True) / q.norm(dim=-1, keepdim=True))

    check(QWEN, "qwen_image", 4.0, finish, guidance=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [0.0, 0.9, 50.0])
def test_z_image_before_its_cap(cap: float) -> None:
    """No longer than a share of |c|, image by image; its scale counts from 0."""

    def finish(q: Tensor, c: Tensor) -> Tensor:
        size, most = (x.flatten(1).norm(dim=1) for x in (q, cap * c))
        factor = (most / size).clamp(max=1.0) if cap else torch.ones_like(size)
        return q * factor.reshape(-1, 1, 1, 1)

    check(Z_IMAGE, "z_image", 4.0, finish, guidance=4.0, cfg_normalization=cap)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux"])
def test_nothing_to_do(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, TWO, guidance=4.0)
    idle = [*(rule(strength=0.0) for rule in RULES), FDG((None, None)), APG(1.0, 0.0, None)]
    for one in idle:
        with hookctl.control(pipe, one, strict=False):
            assert torch.equal(case.run(pipe, TWO, guidance=4.0), plain), one.name
    for rule in RULES:
        assert error(draw_two(case, pipe, rule(), guidance=4.0), plain) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_steps_that_z_image_leaves_unguided_stay(rule: type[Any]) -> None:
    """`cfg_truncation` ends the guidance, and with it the rule."""
    pipe, before, after = made("z_image"), Watch(), Watch()
    draw_two(Z_IMAGE, pipe, before, rule(), after, steps=4, guidance=4.0, cfg_truncation=0.3)
    guided = ["uncond" in parts for parts, _ in before.steps]
    same = [torch.equal(a[1], b[1]) for a, b in zip(before.steps, after.steps, strict=True)]
    assert guided[0] and not guided[-1]
    assert [not one for one in guided] == same
    with pytest.raises(UnsupportedError, match=f"{rule.__name__} is a rule of guidance"):
        draw_two(Z_IMAGE, pipe, rule(), guidance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image"])
def test_apg_takes_the_level_of_the_schedule(name: str) -> None:
    """These tell their model a time of 0 to 1."""
    case, pipe = zoo.PIPELINES[name], made(name, torch.float64)
    before, after, kept = Watch(), Watch(), []

    class Latents(hookctl.Editor):
        def combine(self, predictions: Any) -> Tensor:
            kept.append(predictions.state.latents.double().clone())
            out: Tensor = predictions.guided
            return out

    editors = (Latents(), before, APG(0.2, 0.0, 3.0), after)
    draw_two(case, pipe, *editors, steps=3, guidance=4.0)
    g = 4.0  # to Z-Image's pipeline the tiny ones say 3
    for i, ((parts, _), (_, got)) in enumerate(zip(before.steps, after.steps, strict=True)):
        s = float(pipe.scheduler.sigmas[i])
        u, c = (kept[i] - s * parts[branch].double() for branch in ("uncond", "cond"))
        r = c - u
        r = r * (3.0 / r.flatten(1).norm(dim=1)).clamp(max=1).reshape(-1, *[1] * (r.dim() - 1))
        unit = F.normalize(c.flatten(1), dim=1).reshape(c.shape)
        along = (r * unit).flatten(1).sum(1).reshape(-1, *[1] * (r.dim() - 1)) * unit
        want = (kept[i] - (c + (g - 1) * (r - 0.8 * along))) / s
        if name == "qwen_image":
            size = parts["cond"].norm(dim=-1, keepdim=True)
            want = want * (size / want.norm(dim=-1, keepdim=True))
        assert error(got, want) < 1e-5


def test_pyramids_are_of_places_where_channels_come_last() -> None:
    """Kandinsky 5's latents are [images, frames, height, width, channels]."""
    sides = []

    class Seen(FDG):
        def term(self, step: Guided) -> Tensor:
            sides.append((step.d.shape, self._grid(step.state, step.d).shape))
            found: Tensor = super().term(step)
            assert found.shape == step.d.shape
            return found

    case = WILD["Kandinsky5T2VPipeline"]
    pipe = case.make()
    with hookctl.control(pipe, Seen(scales=(9.0,))):
        case.draw(pipe, ["a red cat"], ["blurry"], [0])
    (b, f, h, w, c), grid = sides[0]
    assert grid == (b, c, f, h, w)
