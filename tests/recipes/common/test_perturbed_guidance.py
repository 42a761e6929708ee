"""PAG and SEG: against diffusers' own PAG, against the literal query blur, and the laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.address.clock import Clock
from hookctl.address.rows import Rows
from hookctl.address.sites import Grid
from hookctl.errors import ConflictError, InputError, UnsupportedError
from hookctl.loop.state import Predictions
from hookctl.recipes import PAG, SAG, SEG, PromptToPrompt
from hookctl.recipes.common.features.smoothing import blur_matrix
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.marks import examples
from tests.recipes.runs import TWO
from tests.recipes.runs import draw_two as draw

SD15, SD15_PAG = zoo.PIPELINES["sd15"], zoo.PIPELINES["sd15_pag"]
TOLERANCE = 1e-5  # fp32; a wider batch sums in another order


class Watch(Editor):
    """Counts rows, keeps predictions."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self.predictions: list[dict[str, Tensor]] = []

    def denoise(self, state: Any, proceed: Any) -> Any:
        self.rows.append(state.rows)
        return proceed()

    def combine(self, predictions: Any) -> Tensor:
        self.predictions.append(dict(predictions.branches))
        return predictions.guided


# -- laws ------------------------------------------------------------------------------------------

NOTHING = [PAG(0.0), SEG(0.0), SEG(sigma=0), PAG(start=0.4, stop=0.4), PAG(1.0, adaptive=0.5)]


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_nothing_to_do_adds_no_rows(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe, watch = case.make(), Watch()
    plain = case.run(pipe, TWO)
    before = fingerprint(pipe)
    editors = NOTHING if name == "sd15" else NOTHING[:3]  # schedules start at different times
    with hookctl.control(pipe, *editors, watch):
        assert torch.equal(case.run(pipe, TWO), plain)
    assert not differences(before, fingerprint(pipe))
    assert {row.branch for rows in watch.rows for row in rows} <= {"cond", "uncond"}
    assert torch.equal(case.run(pipe, TWO), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "wan", "animatediff"])
def test_it_acts_and_leaves_nothing_behind(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, TWO)
    before = fingerprint(pipe)
    results = [draw(case, pipe, editor) for editor in (PAG(), SEG(), SEG(sigma=0.5))]
    for i, one in enumerate(results):
        assert all(error(one, other) > 1e-4 for other in [plain, *results[:i]])
    assert not differences(before, fingerprint(pipe))
    assert torch.equal(case.run(pipe, TWO), plain)


@pytest.mark.slow
def test_one_further_row_for_each_image() -> None:
    for guidance, groups in ((4.0, 4), (1.0, 3)):
        watch = Watch()
        draw(SD15, SD15.make(), PAG(), SEG(), watch, steps=3, n=2, guidance=guidance)
        assert [len(rows) for rows in watch.rows] == [4 * groups] * 3
    watch = Watch()
    draw(SD15, SD15.make(), PAG(start=0.5), watch, steps=4)
    assert [len(rows) for rows in watch.rows] == [4, 4, 6, 6]


# -- the published formulas ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("adaptive", [0.0, 0.004])
def test_pag_is_what_diffusers_own_pipeline_does(guidance: float, adaptive: float) -> None:
    given = {"pag_scale": 3.0, "pag_adaptive_scale": adaptive}
    theirs = SD15_PAG.run(SD15_PAG.make(), TWO, n=2, guidance=guidance, **given)
    ours = draw(SD15, SD15.make(), PAG(3.0, adaptive=adaptive), n=2, guidance=guidance)
    assert error(ours, theirs) < TOLERANCE
    assert error(ours, SD15.run(SD15.make(), TWO, n=2, guidance=guidance)) > 1e-3


@pytest.mark.parametrize("rescale", examples([0.7, 1.0], [0.7]))
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_guidance_rescale_is_of_the_whole_sum(family: str, rescale: float) -> None:
    """As diffusers' own pipelines have it, in float64."""
    case, own = zoo.PIPELINES[family], {"guidance_rescale": rescale}
    pipe = case.make().to(torch.float64)
    cls = {"sd15": StableDiffusionPAGPipeline, "sdxl": StableDiffusionXLPAGPipeline}[family]
    theirs = cls(**pipe.components, pag_applied_layers=["mid"])
    theirs.set_progress_bar_config(disable=True)
    want = case.run(theirs, TWO, n=2, pag_scale=2.0, **own)
    got = draw(case, pipe, PAG(2.0), n=2, **own)
    assert error(got, want) < 1e-11
    # Two that add act alike in any order, and half of one twice is the whole of it.
    halves = draw(case, pipe, PAG(1.0), PAG(1.0, branch="other"), n=2, **own)
    assert error(halves, want) < 1e-11
    one, other = (draw(case, pipe, *e, **own) for e in ((PAG(), SAG()), (SAG(), PAG())))
    assert error(one, other) < 1e-11


def rescaled_sum(parts: dict[str, Tensor], added: Tensor, g: float, phi: float) -> Tensor:
    total = parts["uncond"] + g * (parts["cond"] - parts["uncond"]) + added
    dims = [1, 2, 3]
    new = total * parts["cond"].std(dims, keepdim=True) / total.std(dims, keepdim=True)
    return phi * new + (1 - phi) * total


def test_the_rescaled_sum_of_seg_and_of_an_unknown_pipeline() -> None:
    names = ("cond", "uncond", "blurred")
    parts = {n: torch.randn(2, 4, 8, 8, dtype=torch.float64) for n in names}
    pipe = type("Pipe", (), {"guidance_rescale": 0.6, "guidance_scale": 3.0})()
    state = type(
        "State", (), {"clock": Clock(0, 10, 700.0), "pipe": pipe, "added_guidance": None}
    )()
    own = rescaled_sum(parts, torch.zeros(()), 3.0, 0.6)
    want = rescaled_sum(parts, 2.0 * (parts["cond"] - parts["blurred"]), 3.0, 0.6)
    assert error(SEG(2.0).combine(Predictions(own, parts, state, own)), want) < 1e-12
    # What another editor has changed stays as it is.
    state.added_guidance = None
    edited = Predictions(own + 1, parts, state, own)
    assert error(SEG(2.0).combine(edited), want + 1) < 1e-12
    with pytest.raises(UnsupportedError, match=r"guidance_rescale=0\.6"):
        SEG(2.0).combine(Predictions(own, parts, state, 2 * own))


def test_pag_of_a_joint_sequence_is_what_diffusers_own_pipeline_does() -> None:
    """Without the norm of queries and keys, which their processor for joint attention forgets."""
    case, path = zoo.PIPELINES["sd3"], "transformer_blocks.1.attn"
    pipe = case.make()
    attention = pipe.transformer.get_submodule(path)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        setattr(attention, name, None)
    unused = ("image_encoder", "feature_extractor")
    parts = {name: part for name, part in pipe.components.items() if name not in unused}
    theirs = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=[path])
    theirs.set_progress_bar_config(disable=True)
    want = case.run(theirs, TWO, pag_scale=2.0)
    assert error(draw(case, pipe, PAG(2.0, sites=[path])), want) < TOLERANCE
    assert error(case.run(pipe, TWO), want) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.7, 3.0, math.inf])
@pytest.mark.parametrize("order", [0, 1])
def test_seg_is_the_blur_of_the_projected_queries(sigma: float, order: int) -> None:
    """The official processor, written out as a hook on the query projection, for extra rows."""
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"  # 8 x 8 tokens

    class Literal(PAG):
        def attention(self, call: Any) -> None:
            pass

    def blurred(module: Any, args: Any, out: Tensor) -> Tensor:
        groups = list(out.chunk(3))
        image = groups[2].mT.unflatten(-1, (8, 8))
        if sigma == math.inf:
            image = image.mean((-2, -1), keepdim=True).expand_as(image)
        else:
            image = official_blur(image, sigma)
        return torch.cat([*groups[:2], image.flatten(2).mT])

    pipe = SD15.make()
    handle = pipe.unet.get_submodule(path).to_q.register_forward_hook(blurred)
    want = draw(SD15, pipe, Literal(2.0))
    handle.remove()
    seg = SEG(2.0, sigma=10000.0 if sigma == math.inf else sigma, sites=[path], paper=True)
    assert error(draw(SD15, pipe, seg), want) < TOLERANCE
    if sigma == math.inf:
        assert error(draw(SD15, pipe, SEG(2.0, sites=[path])), want) < TOLERANCE


def official_blur(x: Tensor, sigma: float) -> Tensor:
    """Convolution of [rows, channels, side, side] as the official code does it."""
    side, length = x.shape[-1], math.ceil(6 * sigma)
    length = min(length + 1 - length % 2, side - (side % 2 - 1))
    at = torch.linspace(-(length - 1) / 2, (length - 1) / 2, length)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x)
    kernel = (kernel[:, None] * kernel).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, [length // 2] * 4, mode="reflect"), kernel, groups=x.shape[1])


def test_the_sum_in_float64() -> None:
    parts = {n: torch.randn(2, 4, 8, 8, dtype=torch.float64) for n in ("cond", "perturbed")}
    guided = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    state = type("State", (), {"clock": Clock(0, 10, 700.0), "pipe": None})()
    predictions = Predictions(guided, parts, state)
    want = guided + (3.0 - 0.004 * 300) * (parts["cond"] - parts["perturbed"])
    assert error(PAG(3.0, adaptive=0.004).combine(predictions), want) < 1e-12


# -- the blur --------------------------------------------------------------------------------------


def test_queries_are_blurred_on_their_grid() -> None:
    """Frame by frame, on a grid that is not square."""
    q = torch.randn(2, 1, 3, 2 * 3 * 5, 4, dtype=torch.float64)
    out = SEG(sigma=1.0).smoothed(q, Grid(3, 5, 2))
    frame = q[0, 0, 1, 15:].mT.unflatten(-1, (3, 5))
    want = blur_matrix(3, 1.0) @ frame @ blur_matrix(5, 1.0).mT
    assert error(out[0, 0, 1, 15:], want.flatten(1).mT) < 1e-12
    mean = SEG().smoothed(q, Grid(3, 5, 2))
    assert (
        error(mean[..., :15, :], q[..., :15, :].mean(-2, keepdim=True).expand(-1, -1, -1, 15, -1))
        < 1e-9
    )


# -- together with others --------------------------------------------------------------------------


def test_both_and_two_of_a_kind() -> None:
    pipe = SD15.make()
    watch = Watch()
    both = draw(SD15, pipe, PAG(2.0), SEG(1.0), watch)
    swapped = draw(SD15, pipe, SEG(1.0), PAG(2.0))
    assert error(both, swapped) < TOLERANCE
    for parts in watch.predictions:
        assert {"cond", "uncond", "perturbed", "blurred"} == set(parts)
    other = PAG(2.0, branch="also perturbed", sites="self up")
    assert error(draw(SD15, pipe, PAG(2.0), other), draw(SD15, pipe, PAG(2.0))) > 1e-4
    with pytest.raises(ConflictError, match="PAG and PAG both claim the branch 'perturbed'"):
        draw(SD15, pipe, PAG(2.0), PAG(1.0))
    draw(SD15, pipe, PAG(stop=0.5), PAG(start=0.5))  # one after the other


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_perturbed_row_has_the_edits_of_its_original(name: str) -> None:
    """Prompt-to-Prompt: where nothing is perturbed, both rows predict the same."""
    case = zoo.PIPELINES[name]

    class Unperturbed(PAG):
        def attention(self, call: Any) -> None:
            pass

    watch, pipe = Watch(), case.make()
    edit = PromptToPrompt(TWO, self_replace=0.8, self_resolution=1.0)
    edited = draw(case, pipe, edit, Unperturbed(), watch)
    for parts in watch.predictions:
        assert error(parts["perturbed"], parts["cond"]) < TOLERANCE
    assert error(edited, draw(case, pipe, edit)) < TOLERANCE
    assert error(edited, draw(case, pipe, edit, PAG())) > 1e-4


@pytest.mark.parametrize("order", [0, 1])
def test_borrowed_queries_are_blurred(order: int) -> None:
    """Whichever editor comes first, the self-replaced rows of the blurred branch are blurred."""
    pipe = SD15.make()
    edit = PromptToPrompt(TWO, self_replace=1.0, self_resolution=1.0)
    watch = Watch()
    editors = [edit, SEG(sites="self"), watch]
    draw(SD15, pipe, *(editors if order else editors[::-1]), steps=1)
    [parts] = watch.predictions
    assert error(parts["blurred"][1:], parts["cond"][1:]) > 1e-3


# -- where -----------------------------------------------------------------------------------------


def test_default_sites_are_in_the_middle() -> None:
    for name, want in (
        ("sd15", {"mid_block.attentions.0.transformer_blocks.0.attn1"}),
        ("pixart", {"transformer_blocks.1.attn1"}),
        ("flux", {"single_transformer_blocks.0.attn"}),
    ):
        editor = PAG()
        with hookctl.control(zoo.PIPELINES[name].make(), editor):
            assert set(editor.sites) == want


def test_bad_input() -> None:
    for bad in (-1.0, math.nan, math.inf, "3", True):
        with pytest.raises(InputError, match="PAG: scale"):
            PAG(bad)
    with pytest.raises(InputError, match="PAG: adaptive"):
        PAG(adaptive=-0.1)
    with pytest.raises(InputError, match="SEG: sigma"):
        SEG(sigma=-1.0)
    with pytest.raises(InputError, match="SEG: branch"):
        SEG(branch="")
    with pytest.raises(InputError, match="matches no"):
        draw(SD15, SD15.make(), PAG(sites="self up7"))


# -- the embedded pipeline -------------------------------------------------------------------------


def test_a_wider_blur_degrades_more() -> None:
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    away = []

    def stopping(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._interrupt = True  # the first step is enough
        return {}

    for sigma in (0.4, 1.0, math.inf):
        watch = Watch()
        with hookctl.control(pipe, SEG(sigma=sigma), watch):
            pipe(
                "a large red circle above a small blue square",
                num_inference_steps=3,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                callback_on_step_end=stopping,
            )
        [parts] = watch.predictions
        away.append(error(parts["blurred"], parts["cond"]))
    assert 0 < away[0] < away[1] < away[2]
