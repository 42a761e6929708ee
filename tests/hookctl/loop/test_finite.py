"""NaN and infinity end a run with an error that says where they began."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hookctl
from hookctl.errors import InputError, NotFiniteError
from tests import zoo

SD15 = zoo.PIPELINES["sd15"]


class Idle(hookctl.Editor):
    def attention(self, call: hookctl.AttentionCall) -> None:
        pass


class AtAttention(hookctl.Editor):
    sites = "self mid"

    def attention(self, call: hookctl.AttentionCall) -> None:
        call.replace(call.rows, v=call.v * float("nan"))


class AtCombine(hookctl.Editor):
    start = 0.5

    def combine(self, predictions: hookctl.Predictions) -> torch.Tensor:
        return predictions.guided * float("inf")


class AtEnd(hookctl.Editor):
    start = 0.5

    def after(self, state: hookctl.State) -> None:
        state.latents = state.latents * float("nan")


@pytest.mark.parametrize(
    ("editor", "said"),
    [
        (AtAttention(), "step 0, first in the prediction.*attention"),
        (AtCombine(), "step 1, first in AtCombine.combine"),
        (AtEnd(), "step 1, first in AtEnd.after"),
    ],
)
def test_editors(editor: hookctl.Editor, said: str) -> None:
    pipe = SD15.make()
    with pytest.raises(NotFiniteError, match=said), hookctl.control(pipe, editor):
        SD15.run(pipe, steps=2)
    with hookctl.control(pipe, editor, check_finite=False):
        assert not torch.isfinite(SD15.run(pipe, steps=2)).all()


def break_weight(pipe: Any) -> dict[str, Any]:
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    return {}


def give_embeddings(pipe: Any) -> dict[str, Any]:
    width = pipe.text_encoder.config.hidden_size
    text = torch.zeros(1, 77, width)
    text[0, 3] = float("nan")
    return {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (break_weight, "weights hold.*conv_out.bias"),
        (give_embeddings, "such values in encoder_hidden_states"),
        (lambda pipe: {"guidance_scale": float("inf")}, "guidance scale"),
    ],
)
def test_what_is_given(broken: Callable[[Any], dict[str, Any]], said: str) -> None:
    pipe = SD15.make()
    arguments = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    arguments |= broken(pipe)
    with pytest.raises(NotFiniteError, match=said), hookctl.control(pipe, Idle()):
        pipe(**arguments)


def test_latents_are_checked_first() -> None:
    pipe = SD15.make()
    latents = torch.full((1, 4, 16, 16), float("nan"))
    with pytest.raises(InputError, match="latents hold"), hookctl.control(pipe, Idle()):
        SD15.run(pipe, steps=2, latents=latents)
