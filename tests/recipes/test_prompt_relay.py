"""Prompt Relay against its formula as a matrix in Wan's cross-attention, and its laws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from hookctl import COND, Editor, control
from hookctl.address.text import TextLayout
from hookctl.errors import HookctlWarning, InputError, UnsupportedError
from hookctl.recipes import PromptRelay
from tests import zoo
from tests.recipes.runs import made, relative
from tests.zoo.wild import WILD

WAN = zoo.PIPELINES["wan"]
PARTS = ["a red cat", "a blue dog", "a bird"]
FRAMES, LATENT = 49, 13  # of the video and of its latent


def draw(*editors: Any, prompt: str, dtype: Any = torch.float32, **call: Any) -> Tensor:
    given = {"num_frames": FRAMES, "steps": 1, "max_sequence_length": 32, **call}
    with control(made("wan", dtype), *editors):
        return WAN.run(made("wan", dtype), [prompt], **given)


def relayed(relay: PromptRelay, **call: Any) -> tuple[Tensor, Tensor]:
    """The same video with and without the relay."""
    return tuple(draw(*one, prompt=relay.prompt, **call) for one in ([relay], []))  # type: ignore


# -- the published formula ---------------------------------------------------------------------


def penalty(lengths: list[int], frames: int) -> Tensor:
    """-C of the official code, [frames, parts]."""
    sigma, rows = 1 / math.log(1 / 1e-3), []
    for frame in range(frames):
        start, row = 0, []
        for length in lengths:
            middle, window = (2 * start + length) // 2, max(length / 2 - 2, 0)
            row.append(-(max(abs(frame - middle) - window, 0.0) ** 2) / (2 * sigma**2))
            start += length
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


class Relayed:
    """Wan's cross-attention with penalties in every first of two calls, the conditional one."""

    def __init__(self, bias: Tensor) -> None:
        self.bias, self.calls = bias, 0

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor, *_: Any) -> Tensor:
        text = encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.calls % 2 == 0:
            per_frame = scores.shape[-2] // len(self.bias)
            scores = scores + self.bias.repeat_interleave(per_frame, 0)
        self.calls += 1
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out

    @contextmanager
    def instead(self, model: Any) -> Iterator[None]:
        blocks = [block.attn2 for block in model.blocks]
        before = [attn.processor for attn in blocks]
        for attn in blocks:
            attn.set_processor(Relayed(self.bias))
        try:
            yield
        finally:
            for attn, processor in zip(blocks, before, strict=True):
                attn.set_processor(processor)


@pytest.mark.slow
def test_equals_the_published_penalty() -> None:
    relay = PromptRelay(PARTS, scene="a square", lengths=[6, 4, 3], paper=True)
    pipe = made("wan", torch.float64)
    got, plain = relayed(relay, dtype=torch.float64)
    # Ranges of tokens as the official code counts them: of ever longer texts.
    ends, prompt = [], "a square"
    for part in ["", *PARTS]:
        prompt = f"{prompt} {part}".strip()
        ends.append(len(pipe.tokenizer(prompt).input_ids) - 1)  # without </s>
    bias = torch.zeros(LATENT, 32, dtype=torch.float64)
    for s, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
        bias[:, start:stop] = penalty([6, 4, 3], LATENT)[:, s, None]
    with Relayed(bias).instead(pipe.transformer):
        want = draw(prompt=relay.prompt, dtype=torch.float64)
    assert relative(got, want) < 1e-9  # float64
    assert relative(got, plain) > 1e-4


def test_costs() -> None:
    """Nothing inside a part's own frames; ln 1000 two frames beyond; never less further away."""
    cost = PromptRelay(PARTS, lengths=[1, 2, 1]).cost(12)
    assert cost[:3, 0].max() == cost[3:9, 1].max() == cost[9:, 2].max() == 0
    assert torch.allclose(cost[[4, 10], [0, 1]], torch.tensor(math.log(1000)).double())
    assert (cost[3:, 0].diff() > 0).all() and (cost[:9, 2].diff() < 0).all()


# -- laws --------------------------------------------------------------------------------------


def test_one_part_is_plain() -> None:
    relay = PromptRelay(["a red cat and a dog"])
    got, plain = relayed(relay)
    assert relay.neutral() and torch.equal(got, plain)


def test_outside_its_window_no_bit_changes() -> None:
    got, plain = relayed(PromptRelay(PARTS, start=1.0))
    assert torch.equal(got, plain)


class Watch(Editor):
    """What the tokens of each frame look at, and what is done to which rows."""

    sites = "cross"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.done: list[list[tuple[str, tuple[int, ...]]]] = []

    def attention(self, call: Any) -> None:
        self.done.append([(operation.verb, operation.rows) for operation in call.operations])
        for row in call.rows.where(branch=COND):
            tokens = range(call.k.shape[-2])
            call.read(row, tokens, lambda row, p: self.seen.append(p[0].unflatten(0, (LATENT, -1))))


def test_words_are_looked_at_in_their_frames_alone() -> None:
    """Three frames beyond its own, next to nothing is left of a part; rows of the negative prompt
    are left alone."""
    relay = PromptRelay(["a red cat", "a blue dog"], tail=1.0)
    first, second = relay._places(TextLayout(made("wan")).read(relay.prompt))

    def far(*editors: Any) -> float:
        watch = Watch()
        draw(*editors, watch, prompt=relay.prompt)
        p = torch.stack(watch.seen).mean((0, 2))
        assert [op for op in watch.done if op] == [[("bias", (0,))]] * 2 * len(editors)
        return float(max(p[9:, first].sum(), p[:3, second].sum()) / p.sum())

    assert far(relay) < 1e-6 < 1e-2 < far()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": []}, "parts=.*; give a text for each part"),
        ({"parts": PARTS, "lengths": [1, 2]}, "lengths=.* has 2 entries for 3 parts"),
        ({"parts": PARTS, "lengths": [1, 0, 2]}, "lengths=0; give a finite number above 0"),
        ({"parts": PARTS, "tail": 0.0}, "tail=0.0; give a finite number above 0"),
    ],
)
def test_refused_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptRelay(**given)


def test_refusals() -> None:
    relay = PromptRelay(PARTS)
    with pytest.raises(InputError, match="leave a part without any of 3 frames"):
        draw(PromptRelay(PARTS, lengths=[1, 1, 9]), prompt=relay.prompt, num_frames=9)
    with pytest.raises(InputError, match="call pipe\\(relay.prompt, ...\\)"):
        draw(relay, prompt="a red cat")
    with (
        pytest.warns(HookctlWarning, match="the model does not see"),
        pytest.raises(InputError, match="'a red cat' is not in the text that the encoder reads"),
    ):
        long = PromptRelay(["dog " * 40, "a red cat"])
        draw(long, prompt=long.prompt)
    with pytest.raises(UnsupportedError, match="draws images, which have no frames"):
        with control(made("pixart"), relay):
            zoo.PIPELINES["pixart"].run(made("pixart"), [relay.prompt])
    with pytest.raises(UnsupportedError, match="to one frame at a time"):
        with control(made("animatediff"), relay):
            pass


def test_tokens_of_several_frames_pay_the_mean() -> None:
    """CogVideoX 1.5 makes one token of two frames of the latent."""
    pipe = WILD["CogVideoXPipeline"].make()
    config = {key: one for key, one in pipe.transformer.config.items() if key[0] != "_"}
    in_time = {"patch_size_t": 2, "use_rotary_positional_embeddings": True}
    pipe.transformer = CogVideoXTransformer3DModel(
        **{**config, **in_time, "attention_head_dim": 16}
    )
    seen: list[tuple[Any, Tensor]] = []

    class Seen(PromptRelay):
        def attention(self, call: Any) -> None:
            super().attention(call)
            seen.append((call.grid, self._cost))

    relay = Seen(PARTS[:2])
    with control(pipe, relay):
        drawn = pipe(
            relay.prompt,
            num_inference_steps=1,
            num_frames=16,
            height=16,
            width=16,
            max_sequence_length=16,
            output_type="latent",
        ).frames
    grid, cost = seen[0]
    assert drawn.isfinite().all()
    assert (len(cost), grid.frames) == (4, 2)
