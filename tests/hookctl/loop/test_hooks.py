"""The hooks round the attention: before, denoise, combine, after, features, context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.errors import InputError
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error

SD15 = zoo.PIPELINES["sd15"]
TWO = ["a red cat", "a blue dog"]


def editor(**methods: Any) -> Editor:
    return type("Probe", (Editor,), {n: staticmethod(f) for n, f in methods.items()})()


def draw(case: zoo.Case, pipe: Any, *editors: Editor, **kwargs: Any) -> Tensor:
    case.run(pipe)  # models and pipelines add attributes of their own in their first run
    before = fingerprint(pipe)
    with hookctl.control(pipe, *editors):
        result = case.run(pipe, TWO, **kwargs)
    assert not differences(before, fingerprint(pipe))
    return result


# -- before ----------------------------------------------------------------------------------------


def assign_same(state: Any) -> None:
    state.latents = state.latents.clone()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "instruct_pix2pix", "sd3", "flux", "svd", "wan"])
def test_assigning_the_same_latents_changes_nothing(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    assert torch.equal(draw(case, pipe, editor(before=assign_same)), case.run(pipe, TWO))


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_assigned_latents_reach_model_and_scheduler(scheduler: Any) -> None:
    """Doing it at the first step is drawing from other latents."""
    pipe = SD15.make()
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))

    def assign(state: Any) -> None:
        if state.clock.step == 0:
            state.latents = start * pipe.scheduler.init_noise_sigma
            assert torch.equal(state.latents, start * pipe.scheduler.init_noise_sigma)

    edited = draw(SD15, pipe, editor(before=assign))
    assert torch.equal(edited, SD15.run(pipe, TWO, latents=start))


def test_latents_are_those_of_the_scheduler() -> None:
    """Without the scaling of the model input, and without the image appended to it."""
    for name in ("sdxl", "instruct_pix2pix", "svd"):
        case, seen, stepped = zoo.PIPELINES[name], [], []
        pipe = case.make()
        watch = editor(
            before=lambda state, seen=seen: seen.append(state.latents.clone()),
            after=lambda state, stepped=stepped: stepped.append(state.latents.clone()),
        )
        draw(case, pipe, watch, steps=3)
        for after, following in zip(stepped, seen[1:], strict=False):
            assert torch.equal(after, following), name


def test_images_name_the_rows_of_the_latents() -> None:
    seen = []
    pipe = SD15.make()
    watch = editor(before=lambda state: seen.append((state.images, state.latents.shape)))
    with hookctl.control(pipe, watch):
        SD15.run(pipe, TWO, n=2, steps=1)
    [(images, shape)] = seen
    assert [(p.index, p.prompt, p.image) for p in images] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    ]
    assert shape == (4, 4, 16, 16)


def test_latents_of_a_wrong_shape_are_refused() -> None:
    def wrong(state: Any) -> None:
        state.latents = state.latents[:1]

    with pytest.raises(InputError, match="this run draws"):
        draw(SD15, SD15.make(), editor(before=wrong))


# -- denoise ---------------------------------------------------------------------------------------


def test_standing_round_the_call() -> None:
    pipe, order = SD15.make(), []

    def outer(state: Any, proceed: Any) -> Any:
        order.append("in")
        out = proceed()
        order.append("out")
        return out

    def inner(state: Any, proceed: Any) -> Any:
        order.append("inner")
        return proceed()

    edited = draw(SD15, pipe, editor(denoise=outer), editor(denoise=inner))
    assert order == 2 * ["in", "inner", "out"]
    assert torch.equal(edited, SD15.run(pipe, TWO))


def test_changed_arguments_reach_the_model() -> None:
    pipe = SD15.make()

    def without_text(state: Any, proceed: Any) -> Any:
        state.kwargs["encoder_hidden_states"] = torch.zeros_like(
            state.kwargs["encoder_hidden_states"]
        )
        return proceed()

    edited = draw(SD15, pipe, editor(denoise=without_text))
    zeros = torch.zeros(2, 77, 32)
    expected = SD15.run(
        pipe, [None, None], prompt=None, negative_prompt=None,
        prompt_embeds=zeros, negative_prompt_embeds=zeros,
    )  # fmt: skip
    assert torch.equal(edited, expected)


def test_nested_calls() -> None:
    """An editor's own denoiser calls have the same rows, and no influence on the step."""
    pipe, seen = SD15.make(), []

    def twice(state: Any, proceed: Any) -> Any:
        kwargs = dict(state.kwargs)
        pipe.unet(**kwargs)
        kwargs["timestep"] = state.kwargs["timestep"] // 2
        pipe.unet(**kwargs)
        return proceed()

    watch = editor(
        before=lambda state: seen.append("before"),
        denoise=twice,
        attention=lambda call: seen.append((call.clock.step, repr(call.rows))),
    )
    watch.sites = "mid self"
    assert torch.equal(draw(SD15, pipe, watch), SD15.run(pipe, TWO))
    rows = "uncond[0.0] uncond[1.0] cond[0.0] cond[1.0]"
    assert seen[:4] == ["before", (0, rows), (0, rows), (0, rows)]
    assert seen[4:] == ["before", (1, rows), (1, rows), (1, rows)]


def test_nested_calls_at_the_end_of_a_step() -> None:
    pipe = SD15.make()

    def again(predictions: Any) -> Tensor:
        pipe.unet(**predictions.state.kwargs)
        return predictions.guided

    def after(state: Any) -> None:
        pipe.unet(**state.kwargs)

    edited = draw(SD15, pipe, editor(combine=again, after=after, before=lambda state: None))
    assert torch.equal(edited, SD15.run(pipe, TWO))


# -- combine and after -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "pixart", "wan", "flux", "animatediff"])
def test_guidance_made_again_from_the_branches(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe, worst = case.make(), []
    guidance = max(case.guidance, 3.0)

    def combine(predictions: Any) -> Tensor:
        uncond, cond = predictions["uncond"], predictions["cond"]
        mine = uncond + guidance * (cond - uncond)
        worst.append(error(mine, predictions.guided))
        return mine

    edited = draw(case, pipe, editor(combine=combine), guidance=guidance)
    assert len(worst) == 2 and max(worst) < 1e-6
    assert error(edited, case.run(pipe, TWO, guidance=guidance)) < 1e-5


def test_what_combine_returns_is_stepped() -> None:
    pipe = SD15.make()
    edited = draw(SD15, pipe, editor(combine=lambda predictions: predictions["cond"]))
    assert error(edited, SD15.run(pipe, TWO, guidance=1.0)) < 1e-5


def test_after_the_step() -> None:
    pipe = SD15.make()

    def zero(state: Any) -> None:
        if state.clock.step == 1:
            state.latents = torch.zeros_like(state.latents)

    assert not draw(SD15, pipe, editor(after=zero)).any()
    same = draw(SD15, pipe, editor(after=assign_same))
    assert torch.equal(same, SD15.run(pipe, TWO))


# -- features --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("sd15", 8), ("sdxl", 6), ("svd", 4)])
def test_every_concat_is_shown(name: str, count: int) -> None:
    case, seen = zoo.PIPELINES[name], []
    pipe = case.make()
    edited = draw(case, pipe, editor(features=lambda call: seen.append(call)), steps=1)
    assert torch.equal(edited, case.run(pipe, TWO, steps=1))
    assert [call.order for call in seen] == list(range(count))
    joined = [call.backbone.shape[1] + call.skip.shape[1] for call in seen]
    resnets = [r for block in pipe.unet.up_blocks for r in block.resnets]
    convolutions = [getattr(r, "spatial_res_block", r).conv1.in_channels for r in resnets]
    assert joined == convolutions
    assert all(call.backbone.shape[2:] == call.skip.shape[2:] for call in seen)


def test_scaled_backbone_is_diffusers_own_freeu() -> None:
    """FreeU with s = 1 scales half of the backbone's channels in the first two decoder blocks."""
    pipe = SD15.make()

    def scale(call: Any) -> None:
        if call.block < 2:
            half, gain = call.backbone.shape[1] // 2, (1.3, 1.2)[call.block]
            changed = call.backbone.clone()
            changed[:, :half] *= gain
            call.backbone = changed

    edited = draw(SD15, pipe, editor(features=scale))
    channels = [block.resnets[0].out_channels for block in pipe.unet.up_blocks]
    assert channels[:2] == [32, 32]
    assert not torch.equal(edited, SD15.run(pipe, TWO))
    assert error(edited, _by_hand(pipe)) < 1e-6


def _by_hand(pipe: Any) -> Tensor:
    handles = []
    for block, gain in zip(pipe.unet.up_blocks[:2], (1.3, 1.2), strict=True):
        for resnet in block.resnets:

            def hook(module: Any, args: Any, gain: float = gain) -> Any:
                joined = args[0].clone()
                joined[:, :16] *= gain  # half of the 32 channels of the backbone
                return (joined, *args[1:])

            handles.append(resnet.register_forward_pre_hook(hook))
    result = SD15.run(pipe, TWO)
    for handle in handles:
        handle.remove()
    return result


# -- context ---------------------------------------------------------------------------------------


def text_of(pipe: Any, prompt: str) -> Tensor:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "animatediff"])
def test_text_that_nobody_attends_to(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    width = pipe.unet.config.cross_attention_dim
    extra = torch.randn(1, 20, width)
    edited = draw(case, pipe, editor(context=lambda state: {"other": extra}))
    # One product over more keys may sum in another order.
    assert error(edited, case.run(pipe, TWO)) < 1e-5


def test_another_prompt_through_the_models_own_projections() -> None:
    """All attention given to the extra text is drawing the extra text's prompt."""
    pipe = SD15.make()
    extra = text_of(pipe, "a green bird")

    class Instead(Editor):
        sites = "cross"

        def context(self, state: Any) -> Any:
            return {"bird": extra}

        def attention(self, call: Any) -> None:
            k, v = call.context("bird")
            assert k.shape[-2] == 77 and call.k.shape[-2] == 77
            for row in call.rows.where(branch="cond"):
                own_k, own_v = k[row.index], v[row.index]
                call.add(row, own_k, own_v)
                call.route(row, None, gain=0.0)

    edited = draw(SD15, pipe, Instead())
    expected = SD15.run(pipe, ["a green bird", "a green bird"])
    assert error(edited, expected) < 1e-4


def test_a_context_of_a_wrong_shape() -> None:
    with pytest.raises(InputError, match="context 'other' is"):
        draw(SD15, SD15.make(), editor(context=lambda state: {"other": torch.randn(1, 5, 7)}))


def test_masked_text_is_widened_with_its_mask() -> None:
    case = zoo.PIPELINES["pixart"]
    pipe = case.make()
    extra = torch.randn(1, 9, 32)
    edited = draw(case, pipe, editor(context=lambda state: {"other": extra}))
    assert error(edited, case.run(pipe, TWO)) < 1e-5
