"""Models that take their images and texts as lists (Z-Image): branches, latents, further texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Branch, Editor
from hookctl.address.rows import COND
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.calls import predict
from hookctl.loop.energy import energies
from hookctl.loop.state import Predictions, State
from hookctl.recipes import (
    PAG,
    SEG,
    STG,
    TPG,
    LEDITSPlusPlus,
    MultiInstanceSampler,
    RegionalPrompts,
    SkipLayerGuidance,
)
from tests import zoo
from tests.families.subjects import error
from tests.hookctl.drawing import assign_same, editor
from tests.hookctl.loop.test_energy import Probe, double, share
from tests.recipes.runs import TWO, made

pytestmark = pytest.mark.skipif(
    "z_image" not in zoo.PIPELINES, reason="this diffusers lacks Z-Image"
)

PROMPTS = ["a red cat", "a blue dog on a green bird " * 8]  # of which one is padded further
LONG = {"max_sequence_length": 96}
JOINT = "self, joint"
FULL = (0.0, 0.0, 1.0, 1.0)
EVER: dict[str, Any] = {"start": 0.0, "stop": 1.0}
PERTURBED: dict[str, Callable[[], Any]] = {
    "PAG": lambda: PAG(sites=JOINT),
    "SEG": lambda: SEG(sigma=1.0, sites=JOINT),
    "SLG": lambda: SkipLayerGuidance(layers=[0], **EVER),
    "STG": lambda: STG(layers=[1]),
    "TPG": lambda: TPG(),
}


def run(*editors: Editor, pipe: Any = None, prompts: Any = PROMPTS, **call: Any) -> Tensor:
    case = zoo.PIPELINES["z_image"]
    pipe = pipe or made("z_image")
    with hookctl.control(pipe, *editors):
        found: Tensor = case.run(pipe, list(prompts), **{**LONG, **call})
    return found


def plain(pipe: Any = None, prompts: Any = PROMPTS, **call: Any) -> Tensor:
    case = zoo.PIPELINES["z_image"]
    found: Tensor = case.run(pipe or made("z_image"), list(prompts), **{**LONG, **call})
    return found


# -- branches --------------------------------------------------------------------------------------


class Apart(Editor):
    """Draws a branch of another editor once more, by a call of its own."""

    def __init__(self, name: str, again: Callable[[], None]) -> None:
        self.branch, self.again = name, again
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def combine(self, predictions: Predictions) -> Tensor:
        state = predictions.state
        rows = [replace(row, branch=self.branch) for row in state.rows.where(branch=COND)]
        self.again()
        alone = predictions.handed(predict(state, rows), state.latents)
        self.found.append((predictions[self.branch], alone, predictions[COND]))
        return predictions.guided


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("name", PERTURBED)
def test_a_perturbed_branch_is_that_of_a_call_of_its_own(name: str, guidance: float) -> None:
    pipe = made("z_image", torch.float64)
    edit: Any = PERTURBED[name]()
    # What is drawn anew for every call begins again: a run's first step alone is compared.
    apart = Apart(edit.branch, lambda: edit.begin(None) if name == "TPG" else None)
    got = run(apart, edit, pipe=pipe, steps=1, guidance=guidance)
    [(beside, alone, cond)] = apart.found
    assert error(beside, alone) < 1e-7  # its rotations are in single precision
    assert error(beside, cond) > 1e-4
    assert error(got, plain(pipe, steps=1, guidance=guidance)) > 1e-4


@pytest.mark.parametrize("name", PERTURBED)
def test_the_difference_is_followed(name: str) -> None:
    """guided + s (c - p), in the sign of what the scheduler is given."""
    pipe, edit = made("z_image"), PERTURBED[name]()
    kept: list[Tensor] = []

    def keep(predictions: Predictions) -> Tensor:
        kept.append(predictions.guided)
        if len(kept) == 1:
            kept.append(predictions[COND] - predictions[edit.branch])
        return predictions.guided

    run(editor(combine=keep), edit, editor(combine=keep), pipe=pipe, steps=1)
    before, away, after = kept
    assert error(after, before + edit.scale * away) < 1e-6
    assert float(away.abs().max()) > 1e-4


@pytest.mark.parametrize("name", PERTURBED)
def test_neutral_is_bit_identical(name: str) -> None:
    pipe = made("z_image")
    idle: Any = PERTURBED[name]()
    idle.scale = 0.0
    case = zoo.PIPELINES["z_image"]
    with hookctl.control(pipe, idle, strict=False):
        assert torch.equal(case.run(pipe, PROMPTS, **LONG), plain(pipe))


def test_a_text_of_another_length() -> None:
    """The branch under the other prompt's text predicts what the other prompt does."""
    kept: list[Any] = []

    class Swapped(Editor):
        def branches(self, state: State) -> Any:
            return {"swapped": Branch(text=state.kwargs["cap_feats"][1][None])}

        def combine(self, predictions: Predictions) -> Tensor:
            kept.append((predictions["swapped"], predictions[COND]))
            return predictions.guided

    pipe = made("z_image")
    size = plain(pipe).shape
    start = torch.randn(1, *size[1:], generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)
    run(Swapped(), pipe=pipe, steps=1, latents=start)
    [(swapped, cond)] = kept
    assert error(swapped[0], cond[1]) < 1e-5
    assert error(swapped[0], cond[0]) > 1e-4


def test_texts_that_do_not_fit() -> None:
    pipe = made("z_image")
    for text, match in (
        (torch.zeros(3, 4, 16), r"give \[1 or 2, tokens, 16\]"),
        (torch.zeros(1, 4, 7), r"text is \(1, 4, 7\); give \[1 or 2, tokens, 16\]"),
    ):
        adding = editor(branches=lambda state, text=text: {"other": Branch(text=text)})
        with pytest.raises(InputError, match=match):
            run(adding, pipe=pipe)


# -- the latents of a step -------------------------------------------------------------------------


def test_latents_are_read_and_written_before_the_step() -> None:
    pipe = made("z_image")
    before, stepped = [], []
    watch = editor(
        before=lambda state: before.append(state.latents),
        combine=lambda p: (stepped.append(p.state.latents), p.guided)[1],
    )
    assert torch.equal(run(watch, pipe=pipe), plain(pipe))
    assert all(torch.equal(a, b) for a, b in zip(before, stepped, strict=True))
    assert torch.equal(run(editor(before=assign_same), pipe=pipe), plain(pipe))
    start = torch.randn(before[0].shape, generator=torch.Generator().manual_seed(9))

    def begin_elsewhere(state: State) -> None:
        if state.clock.step == 0:
            state.latents = start

    got = run(editor(before=begin_elsewhere), pipe=pipe)
    assert torch.equal(got, plain(pipe, latents=start))
    with pytest.raises(InputError, match=r"state.latents = \(1, 2\)"):
        run(editor(before=lambda s: setattr(s, "latents", torch.zeros(1, 2))), pipe=pipe)


@pytest.mark.parametrize("name", ["z_image", "wan"])
def test_what_is_not_changed_stays_as_fine_as_it_is_stepped(name: str) -> None:
    """Of latents in float32, of which a model in bfloat16 is shown less."""
    case, pipe = zoo.PIPELINES[name], made(name, torch.bfloat16)
    wanted = case.run(pipe, TWO)

    def half(state: State) -> None:
        state.latents = torch.cat([state.latents[:1], state.latents[1:] * 1.01])

    with hookctl.control(pipe, editor(before=assign_same)):
        assert torch.equal(case.run(pipe, TWO), wanted)
    with hookctl.control(pipe, editor(before=half)):
        found = case.run(pipe, TWO)
    assert torch.equal(found[0], wanted[0])
    assert not torch.equal(found[1], wanted[1])


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    slopes: list[tuple[float, float]] = []
    words = {0: (2,), 1: (2,)}

    def ask(one: Probe, state: State) -> None:
        def found(**options: Any) -> Any:
            paths = one.paths(state, "layers")
            return energies(state, share, reader=one, sites=paths, tokens=words, **options)

        given, step = state.latents.double(), 1e-3  # its rotations are in single precision
        towards = torch.randn(given.shape, generator=generator, dtype=torch.float64)
        ends = [
            found(latents=given + sign * step * towards, wrt=None).values.sum() for sign in (1, -1)
        ]
        gradient = found(latents=given).gradient
        slopes.append((float(ends[0] - ends[1]) / (2 * step), float((gradient * towards).sum())))

    probe = Probe(ask)
    run(probe, pipe=double("z_image"), steps=1)
    [(slope, along)] = slopes
    assert abs(slope) > 1e-4
    assert abs(slope - along) < 1e-3 * abs(slope)


def test_images_of_several_sizes() -> None:
    pipe = made("z_image")
    images, texts = [torch.randn(4, 1, 8, n) for n in (8, 4)], [torch.randn(5, 16)] * 2
    looking = editor(before=lambda state: state.latents)
    with hookctl.control(pipe.transformer, looking, rows=(COND,)):
        with pytest.raises(UnsupportedError, match="images of several sizes"):
            pipe.transformer(images, torch.ones(2), texts)


def test_what_is_not_finite_is_found_at_the_start() -> None:
    pipe = made("z_image")
    latents = torch.full_like(plain(pipe), float("nan"))
    with pytest.raises(InputError, match="latents hold .* values that are NaN"):
        run(PAG(sites=JOINT), pipe=pipe, latents=latents)


# -- further images and texts ----------------------------------------------------------------------


def test_an_image_beside_the_pipelines_own() -> None:
    """Pasted over everything at the end, an instance is a run of its phrase, of another length."""
    pipe = made("z_image")
    edit = MultiInstanceSampler([PROMPTS[1]], [FULL], share=1.0, merge="paste")
    assert error(run(edit, pipe=pipe, prompts=PROMPTS[:1]), plain(pipe, PROMPTS[1:])) < 1e-4


def test_edits_are_guided_by_their_own_texts() -> None:
    pipe = made("z_image")
    edit = LEDITSPlusPlus(["a green bird " * 12], prompts=PROMPTS, masks="none")
    got = run(edit, pipe=pipe, generator=edit.generators())
    wanted = plain(pipe, generator=edit.generators())
    assert error(got[1], wanted[1]) > 1e-3
    assert error(got[0], wanted[0]) < 1e-4


@pytest.mark.parametrize("name", ["SLG", "TPG"])
def test_images_beside_further_texts_follow_their_row(name: str) -> None:
    """Where a row passes a block by, or is given other tokens, so do its copies."""
    pipe = made("z_image")
    edit: Any = PERTURBED[name]()
    regional = RegionalPrompts(["a dog"], [(0, 0, 0.5, 1)])
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: seen.append(out))
        for block in pipe.transformer.layers
    ]
    case = zoo.PIPELINES["z_image"]
    with hookctl.control(pipe, regional, edit):
        case.run(pipe, [PROMPTS[0]], steps=1)
    for handle in handles:
        handle.remove()
    assert seen
    for hidden in seen:  # cond, uncond, perturbed; then the texts beside the first and the last
        assert len(hidden) == 5
        images = hidden.shape[1] - 32
        for copy, own in ((3, 0), (4, 2)):
            assert error(hidden[copy, :images], hidden[own, :images]) < 1e-5
