"""Trained modules in a model that torch.compile has been given."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Editor
from tests.families.subjects import error
from tests.hookctl.drawing import SD15
from tests.hookctl.learned.test_copies import LEARNED
from tests.hookctl.learned.test_ip_adapter import vector
from tests.marks import examples


def run(pipe: Any, editor: Editor) -> Tensor:
    with hookctl.control(pipe, editor):
        return SD15.run(pipe, ["a cat"], steps=1, latents=vector(5, 1, 4, 16, 16))


# Every kind of hook, compiled in either way: one of each takes seconds.
COMPILED = [("GLIGEN", False), ("InstanceDiffusion", True), ("FaceID", True), ("InstantID", False)]


@pytest.mark.parametrize(("name", "in_place"), examples(COMPILED, COMPILED[2:]))
def test_a_compiled_model(name: str, in_place: bool) -> None:
    """Compiled between two sessions. The backend runs what was traced as it is: the same bits."""
    pipe = SD15.make()
    editor = LEARNED[name](pipe)
    want = run(pipe, editor)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch._dynamo.utils.counters.clear()
    try:
        assert torch.equal(run(pipe, editor), want)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        held = weakref.ref(editor)
        del editor
        gc.collect()
        assert held() is None  # compiled code does not keep it
    finally:
        torch._dynamo.reset()


@pytest.mark.long  # minutes: each of the model's kernels is compiled by a C++ compiler
def test_compiled_by_inductor() -> None:
    pipe = SD15.make()
    editor = LEARNED["FaceID"](pipe)
    want = run(pipe, editor)
    pipe.unet.compile()
    try:
        assert error(run(pipe, editor), want) < 1e-5
    finally:
        torch._dynamo.reset()
