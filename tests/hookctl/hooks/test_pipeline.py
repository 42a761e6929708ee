"""The hooks round the denoiser call: latents before it, its arguments, what stands round it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

import hookctl
from hookctl.errors import InputError
from tests import zoo
from tests.hookctl.drawing import SD15, TWO, assign_same, draw, editor

# -- before ----------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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
