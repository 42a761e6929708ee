"""Latents before a step where the pipeline joins images to them: the target's, and they alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import Editor, control
from hookctl.errors import UnsupportedError
from hookctl.loop.calls import predict
from hookctl.loop.energy import energies
from hookctl.loop.inserting import BlockCall
from hookctl.loop.state import State
from hookctl.recipes import TPG
from tests.families.wild import drawn, same
from tests.zoo.edits import EDITS
from tests.zoo.wild import WILD

# Behind the latents in the sequence, or in further channels.
SEQUENCE = (
    *("FluxKontextPipeline", "FluxKontextInpaintPipeline", "QwenImageEditPipeline"),
    *("QwenImageLayeredPipeline", "LongCatImageEditPipeline", "BriaFiboEditPipeline"),
)
CHANNELS = (
    *("FluxFillPipeline", "FluxControlPipeline", "CogView4ControlPipeline", "WanAnimatePipeline"),
    *("WanImageToVideoPipeline", "SkyReelsV2ImageToVideoPipeline", "ChronoEditPipeline"),
    *("LucyEditPipeline", "HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideo15Pipeline"),
    *("HunyuanVideo15ImageToVideoPipeline", "HunyuanImageRefinerPipeline"),
    *("Kandinsky5I2IPipeline", "MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
    *("FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline", "VisualClozePipeline"),
)
EVERYDAY = ("FluxKontextPipeline", "FluxFillPipeline", "WanImageToVideoPipeline")
NAMES = [
    pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.conformance)
    for name in (*SEQUENCE, *CHANNELS)
    if name in WILD
]


class Joined(Editor):
    """Assigns `change` of the latents before each step; keeps what was shown and what was given."""

    def __init__(self, change: Any = torch.clone) -> None:
        self.change = change
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self.stepped: list[Tensor] = []

    def before(self, state: State) -> None:
        model_input, shown = state.kwargs[state.sample].clone(), state.latents.clone()
        state.latents = self.change(shown)
        assert torch.equal(state.latents, self.change(shown))
        self.steps.append((shown, model_input, state.kwargs[state.sample]))

    def combine(self, predictions: Any) -> Tensor:
        self.stepped.append(predictions.state.noisy)
        guided: Tensor = predictions.guided
        return guided


@pytest.mark.parametrize("name", NAMES)
def test_they_are_those_of_the_step(name: str) -> None:
    case = WILD[name]
    pipe, joined = case.make(), Joined()
    plain = drawn(case, pipe)
    with control(pipe, joined, strict=False):
        assert same(drawn(case, pipe), plain)
    for stepped in joined.stepped:
        assert any(
            shown.shape == stepped.shape and torch.equal(shown.to(stepped), stepped)
            for shown, _, _ in joined.steps
        )
    for shown, before, after in joined.steps:
        assert shown.numel() < before[: len(shown)].numel() and torch.equal(before, after)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_joined_stays(name: str) -> None:
    case = WILD[name]
    pipe, joined = case.make(), Joined(torch.zeros_like)
    plain = drawn(case, pipe)
    with control(pipe, joined, strict=False):
        assert not same(drawn(case, pipe), plain)
    for shown, before, after in joined.steps:
        rows = len(before) // len(shown)
        assert int((before != after).sum()) == rows * int((shown != 0).sum())
        assert not after[before != after].any()
    assert same(drawn(case, pipe), plain)


@pytest.mark.parametrize("name", EDITS)
def test_an_energy_of_the_target(name: str) -> None:
    """Its gradient is that of a change of the target's latents, the references being given."""

    class Measured(Editor):
        found: Any = None

        def before(self, state: State) -> None:
            if self.found is not None:
                return
            rows = state.rows.where(branch="cond")

            def loss(latents: Tensor) -> Tensor:
                return predict(state, rows, latents=latents).double().square().sum()

            x = state.latents.double().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(x), [x])
            self.shape, direction = x.shape, torch.randn(x.shape, dtype=x.dtype)
            small = 1e-3 * direction
            with torch.no_grad():
                change = (loss(x + small) - loss(x - small)) / 2
            self.found = change, (gradient * small).sum()
            of_latents = energies(state, lambda image: image.latents.square().sum())
            assert torch.equal(of_latents.gradient, 2 * state.latents)

    model, measured = EDITS[name], Measured()
    pipe = model.make()
    with control(pipe, measured, strict=False):
        model.draw(pipe)
    height, width = model.grids[0]
    assert measured.shape[1] == height * width
    change, by_gradient = measured.found
    assert change == pytest.approx(float(by_gradient), rel=0.05)


@pytest.mark.parametrize("name", EDITS)
def test_a_block_s_own_image(name: str) -> None:
    """Shuffled are the tokens of the target; those of the references stay in their places."""
    calls: list[tuple[Tensor, BlockCall]] = []

    class Seen(TPG):
        def block(self, call: BlockCall) -> None:
            before = call.hidden
            super().block(call)
            calls.append((before, call))

    model = EDITS[name]
    pipe = model.make()
    plain = model.draw(pipe)
    with control(pipe, Seen(sites="transformer_blocks.0*")):
        assert not torch.equal(model.draw(pipe), plain)
    shuffled = [(before, call) for before, call in calls if before is not call.hidden]
    assert shuffled
    for before, call in shuffled:
        target = model.grids[0]
        assert call.grid is not None and (call.grid.height, call.grid.width) == target
        assert call.image == (0, target[0] * target[1])
        ours_at = slice(*call.image)
        rows = call.places(call.rows.where(branch="shuffled"))
        ours, was = call.hidden[rows], before[rows]
        assert torch.equal(ours[:, ours_at.stop :], was[:, ours_at.stop :])
        assert not torch.equal(ours, was)
        of_cells = [x[:, ours_at].sort(1).values for x in (ours, was)]
        assert torch.equal(*of_cells)
        others = [row for row in range(len(before)) if row not in rows]
        assert torch.equal(call.hidden[others], before[others])
    assert torch.equal(model.draw(pipe), plain)


def test_latents_beside_an_image_on_one_canvas_are_refused() -> None:
    case = WILD["DreamLitePipeline"]
    pipe = case.make()
    with control(pipe, Joined()), pytest.raises(UnsupportedError, match="joins images to its lat"):
        drawn(case, pipe)
