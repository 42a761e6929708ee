"""The stacks demo: every member has figures, costs are those of theory, nothing stays behind."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hookctl
from hookctl.cli.run import PRESETS
from hookctl.demos import placing, stacked_edits, stacks, striped
from hookctl.demos.layouts import draw_layout
from tests.marks import examples


@pytest.fixture(scope="module")
def pipe() -> Any:
    return hookctl.load_shapes()


def test_noises() -> None:
    assert list(stacked_edits.noises(5)) == [(0, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("stack", [stacks.REGIONS, stacks.REAL_COMPO, stacks.EXCITED])
def test_every_member_answers_for_something(stack: stacks.Placing) -> None:
    rng = np.random.default_rng(0)
    cases = [draw_layout(rng, stack.objects) for _ in range(2)]
    empty = [Image.new("RGB", (64, 64), "white")] * 2
    figures = stack.read(cases, placing.Drawn(empty, [0.0], [0.0], [0.0], 1.0, 0.0))
    assert list(figures) == list(stack.members)
    assert all(figures.values())


def test_striping(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The adapter changes what is drawn, without a warning, and leaves nothing behind."""
    names = [name for name, _ in pipe.unet.named_modules()]

    def drawn() -> torch.Tensor:
        given = {"num_inference_steps": 2, "output_type": "latent"}
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **given).images

    plain, state = drawn(), striped.lora(pipe, rank=2)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        with stacked_edits.striping(pipe, state):
            assert not torch.equal(drawn(), plain)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records
    assert torch.equal(drawn(), plain)
    assert [name for name, _ in pipe.unet.named_modules()] == names


@pytest.mark.slow
def test_the_adapter_that_comes_along(pipe: Any) -> None:
    """It is what the module makes (which takes a while), but for the rounding to half precision."""
    made, shipped = striped.lora(pipe), load_file(PRESETS / "striped.safetensors")
    assert shipped.keys() == made.keys()
    for name in (n for n in made if ".lora_A." in n):
        up = name.replace(".lora_A.", ".lora_B.")
        # The signs of singular vectors are free: what counts is the change.
        wanted, found = (x[up].float() @ x[name].float() for x in (made, shipped))
        assert (found - wanted).norm() < 5e-3 * wanted.norm()


STACKED = ["Prompt-to-Prompt + FreeU", "MasaCtrl + LoRA"]


@pytest.mark.parametrize("name", examples(STACKED, STACKED[:1]))
def test_costs(pipe: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member of a stack is drawn alone and together, by the trained model."""
    monkeypatch.setitem(stacked_edits.COMMON, "num_inference_steps", 4)
    made = stacks.STACKS[name](pipe, 0, 2)
    assert made.evaluated == 2 * 2 * 4
    assert len(made.rows) == 2 and set(made.figures) >= {"stack", "plain"}
    assert all(peak > 0 for peak in made.peaks)
