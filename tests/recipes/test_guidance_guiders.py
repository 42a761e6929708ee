"""APG, CFGZeroStar, TCFG and FDG: as diffusers' guiders, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    TangentialClassifierFreeGuidance,
    frequency_decoupled_guidance,
)
from torch import Tensor

from hookctl import Editor
from hookctl.recipes import APG, FDG, TCFG, CFGZeroStar
from hookctl.recipes.common.guidance_rule import Guided
from hookctl.recipes.fdg import pyramid, summed
from tests import zoo
from tests.families.subjects import error
from tests.recipes.rules import Watch
from tests.recipes.runs import draw_two as draw
from tests.recipes.runs import made

SD15, SD3 = zoo.PIPELINES["sd15"], zoo.PIPELINES["sd3"]


# -- as diffusers' guiders ---------------------------------------------------------------------


def binomial(x: Tensor) -> Tensor:
    """Correlation with the 5 x 5 binomial kernel over reflected borders, written out."""
    weights, side = [1, 4, 6, 4, 1], [2, 1, 0]
    height, width = x.shape[-2:]
    rows = [*side[:2], *range(height), height - 2, height - 3]
    columns = [*side[:2], *range(width), width - 2, width - 3]
    x = x[..., rows, :][..., columns]
    parts = [
        weights[i] * weights[j] / 256 * x[..., i : i + height, j : j + width]
        for i in range(5)
        for j in range(5)
    ]
    return torch.stack(parts).sum(0)


def pyrup(x: Tensor) -> Tensor:
    return binomial(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


def build(x: Tensor, levels: int) -> list[Tensor]:
    """kornia's Laplacian pyramid, of sides that are powers of 2."""
    gaussian = [x]
    for _ in range(levels - 1):
        gaussian.append(F.avg_pool2d(binomial(gaussian[-1]), 2))
    return [*(a - pyrup(b) for a, b in zip(gaussian, gaussian[1:], strict=False)), gaussian[-1]]


@pytest.fixture
def kornia(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers takes of kornia, which is not installed."""
    for name, value in (
        ("_CAN_USE_KORNIA", True),
        ("upsample_and_blur_func", pyrup),
        ("build_laplacian_pyramid_func", build),
    ):
        monkeypatch.setattr(frequency_decoupled_guidance, name, value)


def apg(momentum: float | None, rho: float, eta: float) -> Any:
    return lambda g, phi: AdaptiveProjectedGuidance(g, momentum, rho, eta=eta, guidance_rescale=phi)


PAIRS = [
    (lambda: APG(0.0, -0.5, 2.0, space="prediction"), apg(-0.5, 2.0, 0.0)),
    (lambda: APG(0.3, 0.6, None, space="prediction"), apg(0.6, 0.0, 0.3)),
    (lambda: APG(0.0, 0.0, 15.0, space="prediction"), apg(None, 15.0, 0.0)),
    (CFGZeroStar, lambda g, phi: ClassifierFreeZeroStarGuidance(g, 0, guidance_rescale=phi)),
    (TCFG, lambda g, phi: TangentialClassifierFreeGuidance(g, guidance_rescale=phi)),
    (FDG, lambda g, phi: FrequencyDecoupledGuidance(guidance_rescale=phi)),
    (
        lambda: FDG((8.0, 4.0, 2.0)),
        lambda g, phi: FrequencyDecoupledGuidance([8.0, 4.0, 2.0], guidance_rescale=phi),
    ),
]
# diffusers computes alpha and the decomposition in float32.
FLOAT32 = (ClassifierFreeZeroStarGuidance, TangentialClassifierFreeGuidance)


@pytest.mark.slow
@pytest.mark.usefixtures("kornia")
@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize("pair", PAIRS)
def test_as_diffusers_guider(pair: tuple[Any, Any], phi: float) -> None:
    """Step by step, over the predictions that the run itself made."""
    rule, guider = pair[0](), pair[1](4.0, phi)
    pipe, before, after = made("sd15", torch.float64), Watch(), Watch()
    editors = (before, rule, after)
    steps = 4
    for _ in range(2):  # the momentum of one run is not the next one's
        before.steps, after.steps = [], []
        draw(SD15, pipe, *editors, steps=steps, guidance=4.0, guidance_rescale=phi)
    plain = 0.0
    for i in range(steps):
        parts, own = before.steps[i]
        guider.set_state(i, steps, torch.tensor(0))
        guider.prepare_inputs({"x": (parts["cond"], parts["uncond"])})
        want = guider.forward(parts["cond"], parts["uncond"]).pred
        assert error(after.steps[i][1], want) < (5e-5 if isinstance(guider, FLOAT32) else 1e-12)
        plain = max(plain, error(own, want))
    assert plain > 1e-4


@pytest.mark.usefixtures("kornia")
def test_a_flow_model_with_zero_steps() -> None:
    """The velocity of the first steps is 0: they leave the latents."""
    pipe, before, after = made("sd3", torch.float64), Watch(), Watch()
    guider = ClassifierFreeZeroStarGuidance(4.0, 2)
    draw(SD3, pipe, before, CFGZeroStar(2), after, steps=3)
    for i, ((parts, _), (_, got)) in enumerate(zip(before.steps, after.steps, strict=True)):
        guider.set_state(i, 3, torch.tensor(0))
        want = guider.forward(parts["cond"], parts["uncond"]).pred
        assert error(got, want) < 1e-5 if want.any() else torch.equal(got, want)
    assert not after.steps[1][1].any()
    assert after.steps[2][1].any()


def test_tcfg_is_the_decomposition() -> None:
    """The closed form against the SVD, in float64."""
    u, other = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    for c in (other, u + 0.01 * other, 3 * u, -u + 0.1 * other):
        rows = torch.stack([c.flatten(1), u.flatten(1)], 1)
        v = torch.linalg.svd(rows, full_matrices=False)[2][:, 0]
        damped = ((u.flatten(1) * v).sum(1, keepdim=True) * v).reshape(u.shape)
        got = TCFG().term(step_of(u, c, 5.0))
        assert (got - (1 - 5.0) * (damped - u)).abs().max() < 1e-12
    one, across = torch.eye(2).reshape(2, 1, 1, 2)
    assert not TCFG().term(step_of(one, across, 5.0)).any()  # no direction is the first


def step_of(u: Tensor, c: Tensor, g: float) -> Guided:
    scales = torch.full((len(u), *[1] * (u.dim() - 1)), g).to(u)
    return Guided(u, c, scales, u + g * (c - u), state=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_apg_of_clean_images(name: str) -> None:
    """The paper's space: d, its norm and c are those of x0, by the scheduler's own levels."""
    case, pipe = zoo.PIPELINES[name], made(name, torch.float64)
    before, after, latents = Watch(), Watch(), []

    class Latents(Editor):
        def before(self, state: Any) -> None:
            latents.append(state.latents.clone())

    draw(case, pipe, Latents(), before, APG(0.2, -0.5, 3.0), after, steps=3, guidance=4.0)
    total: Tensor | float = 0.0
    for i, t in enumerate(pipe.scheduler.timesteps):
        if name == "sd3":
            a, s = 1 - pipe.scheduler.sigmas[i].double(), pipe.scheduler.sigmas[i].double()
        else:
            a, s = (z.double().sqrt() for z in split_alpha(pipe.scheduler.alphas_cumprod[t]))

        def clean(z: Tensor, x: Tensor = latents[i], a: Tensor = a, s: Tensor = s) -> Tensor:
            return x - s * z if name == "sd3" else (x - s * z) / a

        u, c = (clean(before.steps[i][0][branch]) for branch in ("uncond", "cond"))
        total = r = (c - u) - 0.5 * total
        r = r * (3.0 / r.flatten(1).norm(dim=1)).clamp(max=1).reshape(-1, 1, 1, 1)
        unit = F.normalize(c.flatten(1), dim=1).reshape(c.shape)
        along = (r * unit).sum([1, 2, 3], keepdim=True) * unit
        assert error(clean(after.steps[i][1]), c + 3.0 * (r - 0.8 * along)) < 1e-6


def split_alpha(alpha: Tensor) -> Sequence[Tensor]:
    return alpha, 1 - alpha


# -- the pyramid -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (7, 12), (9, 9, 11)])
def test_a_pyramid_sums_to_its_image(size: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    for levels in (1, 2, 3):
        found = pyramid(x, levels)
        assert len(found) == levels
        assert (summed(found) - x).abs().max() < 1e-14
