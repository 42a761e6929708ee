"""What editors change inside a model beside its attention is what hooks by hand would change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

import hookctl
from hookctl import COND, UNCOND, Residuals
from hookctl.errors import InputError, UnsupportedError
from tests import zoo
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO, draw, editor

QUERIES = "attn2.to_q"


def hand(pipe: Any, install: Callable[[nn.Module, list[Any]], None]) -> Tensor:
    """The latents of TWO while hooks of torch's own are installed."""
    handles: list[Any] = []
    install(pipe.unet, handles)
    try:
        return SD15.run(pipe, TWO)
    finally:
        for handle in handles:
            handle.remove()


def is_queries(path: str) -> bool:
    return path.endswith(QUERIES)


def low_rank(inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed + 100 * inputs + outputs)
    return torch.randn(2, inputs, generator=noise), torch.randn(outputs, 2, generator=noise) * 0.3


# -- insert ----------------------------------------------------------------------------------------


def test_streams_are_shown_and_left_as_they_are() -> None:
    pipe, seen = SD15.make(), []
    edited = draw(SD15, pipe, editor(insert=lambda call: seen.append(call)), num_inference_steps=1)
    assert torch.equal(edited, SD15.run(pipe, TWO, num_inference_steps=1))
    blocks = [m for m in pipe.unet.modules() if isinstance(m, BasicTransformerBlock)]
    assert len(seen) == len(blocks)
    assert all(call.site.kind == "self" and call.grid is not None for call in seen)
    assert all(len(call.hidden) == len(call.rows) == 4 for call in seen)


def test_a_changed_stream_is_what_follows_sees() -> None:
    pipe = SD15.make()

    def change(call: Any) -> None:
        changed = call.hidden.clone()
        changed[[row.index for row in call.rows.where(branch=COND)]] *= 1.5
        call.hidden = changed

    def install(unet: nn.Module, handles: list[Any]) -> None:
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                streams: dict[str, Tensor] = {}
                handles += [
                    block.register_forward_pre_hook(lambda _, a, s=streams: s.update(x=a[0])),
                    block.attn1.register_forward_hook(lambda _, a, o, s=streams: grown(o, s["x"])),
                ]

    def grown(output: Tensor, stream: Tensor) -> Tensor:
        whole = stream + output
        whole[2:] *= 1.5
        return whole - stream

    plain = SD15.run(pipe, TWO)
    edited = draw(SD15, pipe, editor(insert=change))
    assert not torch.equal(edited, plain)
    assert error(edited, hand(pipe, install)) < 1e-5


def test_attention_inside_an_insert_is_nobodys() -> None:
    """What is inserted may attend by itself; no editor is shown that as the model's own call."""
    pipe, seen = SD15.make(), []

    def attend(call: Any) -> None:
        x = call.hidden[:, None]
        call.hidden = call.hidden + 0.1 * F.scaled_dot_product_attention(x, x, x)[:, 0]

    watching = editor(attention=lambda call: seen.append(call.site.path))
    edited = draw(SD15, pipe, watching, editor(insert=attend), num_inference_steps=1)
    assert len(seen) == len(pipe.unet.attn_processors)
    alone = draw(SD15, pipe, editor(insert=attend), num_inference_steps=1)
    assert torch.equal(edited, alone)


def test_nothing_is_inserted_where_the_attention_is_scaled() -> None:
    case = zoo.PIPELINES["pixart"]
    pipe = case.make()
    with pytest.raises(UnsupportedError, match="inserts between .* this .* has none"):
        with hookctl.control(pipe, editor(insert=lambda call: None)):
            pass


def test_another_shape_is_an_error() -> None:
    pipe = SD15.make()

    def cut(call: Any) -> None:
        call.hidden = call.hidden[:, 1:]

    with pytest.raises(InputError, match=r"insert assigned .* to call\.hidden"):
        draw(SD15, pipe, editor(insert=cut))


# -- linear ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", [None, UNCOND])
def test_low_rank_deltas_are_those_of_a_lora(branch: str | None) -> None:
    pipe = SD15.make()

    def change(call: Any) -> None:
        down, up = low_rank(call.input.shape[-1], call.output.shape[-1])
        rows = None if branch is None else call.rows.where(branch=branch)
        call.add(down, up, 0.7, rows=rows)

    def install(unet: nn.Module, handles: list[Any]) -> None:
        for path, module in unet.named_modules():
            if is_queries(path):

                def hook(module: Any, args: Any, output: Tensor) -> Tensor:
                    down, up = low_rank(module.in_features, module.out_features)
                    delta = 0.7 * args[0] @ down.T @ up.T
                    if branch is not None:
                        delta[2:] = 0
                    return output + delta

                handles.append(module.register_forward_hook(hook))

    edited = draw(SD15, pipe, editor(linear=change, linears=is_queries))
    assert not torch.equal(edited, SD15.run(pipe, TWO))
    assert error(edited, hand(pipe, install)) < 1e-5


def test_a_delta_of_some_tokens() -> None:
    pipe, found = SD15.make(), []

    def change(call: Any) -> None:
        before = call.output
        half = torch.zeros(call.grid.height, call.grid.width)
        half[:, : call.grid.width // 2] = 1
        down, up = low_rank(call.input.shape[-1], call.output.shape[-1])
        call.add(down, up, tokens=half.flatten())
        changed = (call.output != before).any(-1).reshape(-1, *call.grid)
        found.append(bool(changed[..., : call.grid.width // 2].all()))
        assert not changed[..., call.grid.width // 2 :].any()

    draw(SD15, pipe, editor(linear=change, linears=is_queries), num_inference_steps=1)
    assert found and all(found)


def test_a_delta_of_other_widths_is_an_error() -> None:
    pipe = SD15.make()
    change = lambda call: call.add(torch.ones(2, 3), torch.ones(5, 2))  # noqa: E731
    with pytest.raises(InputError, match=r"attn2\.to_q: a low-rank delta of \(2, 3\)"):
        draw(SD15, pipe, editor(linear=change, linears=is_queries))
    with pytest.raises(UnsupportedError, match="linear layers that its `linears` selects"):
        draw(SD15, pipe, editor(linear=change))


# -- stem ------------------------------------------------------------------------------------------


def test_further_channels_enter_by_another_convolution() -> None:
    pipe = SD15.make()
    extra = torch.rand(1, 2, 16, 16)
    first = pipe.unet.conv_in
    weight = torch.cat([first.weight, torch.rand(first.out_channels, 2, 3, 3) * 0.1], 1).detach()

    def change(call: Any) -> None:
        if call.clock.step == 0:
            call.convolve(weight, call.layer.bias, extra)

    step = []

    def install(unet: nn.Module, handles: list[Any]) -> None:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
            step.append(0)
            if len(step) > 1:
                return None
            return output + F.conv2d(extra, weight[:, 4:], padding=1)

        handles.append(unet.get_submodule("conv_in").register_forward_hook(hook))

    edited = draw(SD15, pipe, editor(stem=change))
    assert not torch.equal(edited, SD15.run(pipe, TWO))
    assert error(edited, hand(pipe, install)) < 1e-5


# -- residuals -------------------------------------------------------------------------------------


def shapes_of_skips(unet: Any) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Channels and sides of the skips and of the middle, at a latent of 16 x 16."""
    sides, skips = 16, [(unet.conv_in.out_channels, 16, 16)]
    for block in unet.down_blocks:
        skips += [(resnet.out_channels, sides, sides) for resnet in block.resnets]
        if block.downsamplers is not None:
            sides //= 2
            skips.append((block.resnets[-1].out_channels, sides, sides))
    return skips, (unet.mid_block.resnets[-1].out_channels, sides, sides)


def test_residuals_are_those_of_a_controlnet() -> None:
    """The same residuals by the hook and by the pipeline's own ControlNet; both at once add."""
    case = zoo.PIPELINES["controlnet"]
    pipe, kept = case.make(), []
    plain = case.run(pipe, TWO)
    net = pipe.controlnet.forward

    def gives(factor: float) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            skips, middle = net(*args, **kwargs)
            kept.append((skips, middle))
            return [factor * skip for skip in skips], factor * middle

        return forward

    ours = editor(residuals=lambda state: Residuals(*kept[-1]))
    pipe.controlnet.forward = gives(0)
    with hookctl.control(pipe, ours):
        assert error(case.run(pipe, TWO), plain) < 1e-6
    pipe.controlnet.forward = gives(2)
    twice = case.run(pipe, TWO)
    pipe.controlnet.forward = gives(1)
    with hookctl.control(pipe, ours):
        assert error(case.run(pipe, TWO), twice) < 1e-5
    assert error(twice, plain) > 1e-4


@pytest.mark.slow
def test_residuals_without_a_controlnet_and_of_two_editors() -> None:
    pipe = SD15.make()
    skips, middle = shapes_of_skips(pipe.unet)
    noise = torch.Generator().manual_seed(0)

    def give(state: Any) -> Residuals:
        noise.manual_seed(state.clock.step)
        return Residuals([torch.rand(4, *s, generator=noise) for s in skips])

    one = draw(SD15, pipe, editor(residuals=give))
    assert not torch.equal(one, SD15.run(pipe, TWO))
    zeros = lambda state: Residuals([torch.zeros(4, *s) for s in skips], torch.zeros(4, *middle))  # noqa: E731
    assert torch.equal(draw(SD15, pipe, editor(residuals=give), editor(residuals=zeros)), one)
    assert torch.equal(draw(SD15, pipe, editor(residuals=lambda state: None)), SD15.run(pipe, TWO))
    few = editor(residuals=lambda state: Residuals([torch.zeros(1)]))
    with pytest.raises(InputError, match="different models"):
        draw(SD15, pipe, editor(residuals=give), few)


# -- wherever the model is -------------------------------------------------------------------------


def everything() -> list[Any]:
    """An editor for each of the three hooks that change layers."""

    def insert(call: Any) -> None:
        call.hidden = call.hidden * (1.1 + 0.1 * call.clock.step)

    def linear(call: Any) -> None:
        down, up = low_rank(call.input.shape[-1], call.output.shape[-1])
        call.add(down, up, 0.1)

    def stem(call: Any) -> None:
        call.output = call.output * 1.1

    return [
        editor(insert=insert),
        editor(linear=linear, linears=is_queries),
        editor(stem=stem),
    ]


@pytest.mark.long  # a whole UNet is compiled twice
def test_compiled_code_calls_them_at_every_step() -> None:
    pipe = SD15.make()
    with hookctl.control(pipe, *everything()):
        eager = SD15.run(pipe, TWO)
    plain = SD15.run(pipe, TWO)
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    torch._dynamo.reset()
    with hookctl.control(pipe, *everything()):
        assert error(SD15.run(pipe, TWO), eager) < 1e-5
    assert error(SD15.run(pipe, TWO), plain) < 1e-5
    torch._dynamo.reset()


def test_gradient_checkpointing_makes_them_again() -> None:
    pipe = SD15.make()
    pipe.unet.train().enable_gradient_checkpointing()
    grads = []
    for checkpointing in (True, False):
        if not checkpointing:
            pipe.unet.disable_gradient_checkpointing()
        x = torch.ones(2, 4, 16, 16, requires_grad=True)
        text = torch.ones(2, 7, pipe.unet.config.cross_attention_dim)
        with hookctl.control(pipe.unet, *everything(), rows=("uncond", "cond")):
            pipe.unet(x, 5, text).sample.sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert error(grads[0], grads[1]) < 1e-5
