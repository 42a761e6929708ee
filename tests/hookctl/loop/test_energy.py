"""Energies: gradients against finite differences, an early end, and everything as it was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

import hookctl
from hookctl.address.families import denoiser_of
from hookctl.editor import Editor
from hookctl.errors import HoleError, InputError
from hookctl.loop.energy import Energies, ImageMaps, MapReader, energies
from hookctl.loop.state import State
from hookctl.recipes import FreeU
from tests import zoo

PROMPTS = ["a red cat above a blue square", "a blue dog"]
TOKENS = {0: (2, 3), 1: (1,)}


def share(image: ImageMaps) -> Tensor:
    """Attention in the upper half, squared: a scalar that is not linear in the maps."""
    parts = []
    for one in image.maps.values():
        half = one.shape[2] // 2
        parts.append((one[:, :, :half].sum((2, 3)) / one.sum((2, 3)).clamp_min(1e-9)) ** 2)
    return torch.stack([part.mean() for part in parts]).sum() * 10


class Probe(MapReader):
    """Asks for energies before the first step and keeps what it got."""

    def __init__(self, ask: Callable[[Probe, State], Any], sites: Any = "cross, joint") -> None:
        self.ask, self.sites = ask, sites
        self.found: Any = None

    def before(self, state: State) -> None:
        if self.found is None:
            self.found = self.ask(self, state)

    def paths(self, state: State, pattern: str = "") -> list[str]:
        sites = hookctl.control(state.pipe).sites
        return [s.path for s in sites if s.kind in ("cross", "joint") and pattern in s.path]


def probe(
    ask: Callable[[Probe, State], Any], *others: Editor, family: str = "sd15", **options: Any
) -> Any:
    case = zoo.PIPELINES[family]
    pipe = options.pop("pipe", None) or case.make()
    one = Probe(ask)
    with hookctl.control(pipe, *others, one):
        case.run(pipe, PROMPTS, steps=2, **options)
    return one.found


def double(family: str = "sd15") -> Any:
    pipe = zoo.PIPELINES[family].make()
    denoiser_of(pipe).double()
    pipe.text_encoder.double()
    return pipe


def wanted(one: Probe, state: State, **options: Any) -> Energies:
    paths = one.paths(state, options.pop("pattern", "down"))
    return energies(state, share, reader=one, sites=paths, tokens=TOKENS, **options)


@pytest.mark.parametrize("wrt", ["latents", "text"])
def test_the_gradient_is_that_of_finite_differences(wrt: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def ask(one: Probe, state: State) -> tuple[float, float]:
        found = wanted(one, state, wrt=wrt)
        given = state.latents if wrt == "latents" else state.kwargs["encoder_hidden_states"][2:]
        given, step = given.double(), 1e-5
        towards = torch.randn(given.shape, generator=generator, dtype=torch.float64)
        ends = [
            wanted(one, state, wrt=None, **{wrt: given + sign * step * towards}).values.sum()
            for sign in (1, -1)
        ]
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert found.gradient is not None
        return slope, float((found.gradient * towards).sum())

    slope, along = probe(ask, pipe=double())
    assert abs(slope) > 1e-4
    assert abs(slope - along) < 1e-6 * max(1.0, abs(slope))


def test_an_early_end_changes_nothing_and_runs_less() -> None:
    ran: list[str] = []
    pipe = zoo.PIPELINES["sd15"].make()
    unet = denoiser_of(pipe)

    def ask(one: Probe, state: State) -> list[Any]:
        out: list[Any] = []
        handles = [
            m.register_forward_hook(lambda *_, name=name: ran.append(name))
            for name, m in unet.named_modules()
            if name in ("down_blocks.0", "mid_block", "up_blocks.0", "conv_out")
        ]
        for early in (True, False):
            ran.clear()
            found = wanted(one, state, pattern="down_blocks.0", early_exit=early)
            out.append((found, list(ran)))
        for handle in handles:
            handle.remove()
        return out

    (early, few), (late, all_of_it) = probe(ask, pipe=pipe)
    assert torch.equal(early.values, late.values)
    assert torch.equal(early.gradient, late.gradient)
    assert "mid_block" not in few and "up_blocks.0" not in few and "conv_out" not in few
    assert "conv_out" in all_of_it


@pytest.mark.parametrize(
    "family",
    [n for n in ("sd15", "sdxl", "sd3", "flux", "pixart", "z_image") if n in zoo.PIPELINES],
)
def test_images_of_a_batch_have_gradients_of_their_own(family: str) -> None:
    """Also under no_grad, with several images of a prompt, on every kind of model."""

    def ask(one: Probe, state: State) -> tuple[Energies, list[Energies], Tensor]:
        def of(which: int | None) -> Energies:
            def scalar(image: ImageMaps) -> Tensor:
                key = image.row.prompt * 2 + image.row.image
                return share(image) * float(which is None or which == key)

            paths = one.paths(state)[:1]
            return energies(state, scalar, reader=one, sites=paths, tokens=TOKENS)

        return of(None), [of(i) for i in range(4)], state.latents

    together, apart, latents = probe(ask, family=family, n=2)
    assert together.gradient.shape == latents.shape
    assert float(together.gradient.flatten(1).norm(dim=1).min()) > 0
    for i, one in enumerate(apart):
        others = [j for j in range(4) if j != i]
        assert float(one.gradient[others].abs().max()) == 0
        assert torch.allclose(one.gradient[i], together.gradient[i], rtol=1e-4, atol=1e-9)


def test_a_tensor_from_outside() -> None:
    """The chain rule through latents that depend on it."""

    def ask(one: Probe, state: State) -> tuple[Tensor, Tensor]:
        inner = wanted(one, state).gradient
        gain = torch.ones((), requires_grad=True)
        with torch.enable_grad():
            latents = state.latents * gain
        outer = wanted(one, state, latents=latents, wrt=gain).gradient
        return outer, (inner * state.latents).sum()

    outer, chained = probe(ask)
    assert torch.allclose(outer, chained, rtol=1e-4)


def test_other_editors_act_in_it_and_read_nothing() -> None:
    maps = hookctl.Maps("cat")

    def ask(one: Probe, state: State) -> tuple[Tensor, int]:
        found = wanted(one, state, pattern="up").values
        return found, len(maps.store.records)

    plain, _ = probe(ask)
    pipe = zoo.PIPELINES["sd15"].make()
    edited, kept = probe(ask, FreeU(1.8, 1.8, 0.2, 0.2), maps, pipe=pipe)
    assert not torch.allclose(plain, edited)
    assert kept == 0
    assert not any(record.map.requires_grad for record in maps.store.records)


def test_heads_apart_average_to_the_mean() -> None:
    def ask(one: Probe, state: State) -> list[Tensor]:
        kept: list[Tensor] = []

        def scalar(image: ImageMaps) -> Tensor:
            kept.append(next(iter(image.maps.values())))
            return kept[-1].sum()

        for heads in (False, True):
            one.heads = heads
            paths = one.paths(state)[:1]
            energies(state, scalar, reader=one, sites=paths, tokens=TOKENS, wrt=None)
        return kept

    mean, _, heads, _ = probe(ask)
    assert mean.shape[1] == 1 and heads.shape[1] > 1
    assert torch.allclose(heads.mean(1, keepdim=True), mean, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    unet = denoiser_of(pipe)
    unet.train()
    next(iter(unet.parameters())).requires_grad_(False)
    before = [p.requires_grad for p in unet.parameters()]
    state = torch.get_rng_state()
    probe(wanted, pipe=pipe)
    assert [p.requires_grad for p in unet.parameters()] == before
    assert all(p.grad is None for p in unet.parameters())
    assert all(m.training for m in unet.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_a_reader_that_looks_and_does_nothing_is_bit_identical() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    plain = case.run(pipe, PROMPTS)
    with hookctl.control(pipe, Probe(wanted)):
        assert torch.equal(case.run(pipe, PROMPTS), plain)
    assert torch.equal(case.run(pipe, PROMPTS), plain)


def test_under_gradient_checkpointing() -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    plain = probe(lambda one, state: wanted(one, state, pattern="up"), pipe=pipe)
    denoiser_of(pipe).enable_gradient_checkpointing()
    again = probe(lambda one, state: wanted(one, state, pattern="up"), pipe=pipe)
    assert torch.allclose(plain.gradient, again.gradient, rtol=1e-4, atol=1e-8)


def test_sigma_space() -> None:
    """The gradient is to the scheduler's own latents, before it scales them."""
    pipe = zoo.PIPELINES["sd15"].make()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def ask(one: Probe, state: State) -> tuple[Tensor, Tensor, float]:
        found = wanted(one, state).gradient
        sigma = float(pipe.scheduler.sigmas[0])
        bare = energies(
            unscaled(state, sigma), share, reader=one,
            sites=one.paths(state, "down"), tokens=TOKENS,
        ).gradient  # fmt: skip
        return found, bare, (sigma**2 + 1) ** -0.5

    found, bare, factor = probe(ask, pipe=pipe)
    assert torch.allclose(found, bare * factor, rtol=1e-3, atol=1e-9)


def unscaled(state: State, sigma: float) -> State:
    """The same call, so that the rows it asks for are known, with latents as the model has them."""
    state.assigned = state.latents / (sigma**2 + 1) ** 0.5
    state.scaling = None
    return state


def test_an_energy_of_the_latents_alone_makes_no_call() -> None:
    calls: list[int] = []

    def ask(one: Probe, state: State) -> Energies:
        handle = state.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
        found = energies(state, lambda image: (image.latents**2).sum())
        handle.remove()
        return found

    found = probe(ask)
    assert not calls
    assert found.gradient is not None and float(found.gradient.abs().max()) > 0


def test_what_cannot_be() -> None:
    def inference(one: Probe, state: State) -> None:
        with torch.inference_mode():
            wanted(one, state)

    with pytest.raises(InputError, match="inference_mode"):
        probe(inference)
    with pytest.raises(InputError, match="wrt='prompt'"):
        probe(lambda one, state: wanted(one, state, wrt="prompt"))

    def stranger(one: Probe, state: State) -> None:
        paths = one.paths(state)[:1]
        energies(state, share, reader=MapReader(), sites=paths, tokens=TOKENS)

    with pytest.raises(HoleError, match="in the stack"):
        probe(stranger)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e5])
def test_gradients_of_float16_calls_neither_vanish_nor_overflow(size: float) -> None:
    def ask(one: Probe, state: State) -> Energies:
        paths = one.paths(state)

        def scaled(image: ImageMaps) -> Tensor:
            return size * share(image)

        return energies(state, scaled, reader=one, sites=paths, tokens=TOKENS)

    exact = probe(ask).gradient
    pipe = zoo.PIPELINES["sd15"].make()
    found = probe(ask, pipe=pipe.to(torch.float16)).gradient
    assert float((found - exact).norm() / exact.norm()) < 0.05
