"""The trainer of a collaboration: what is learned when, and a file that the loader reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hookctl
from hookctl.demos.shapes.hooks import collaboration
from hookctl.demos.shapes.hooks.collaboration import SIZES, CollaborationTask, class_ids, ldm_names
from hookctl.demos.shapes.hooks.measure_collaboration import measure
from hookctl.demos.shapes.hooks.task import Base
from hookctl.demos.shapes.world import Scene, Thing
from hookctl.learned.collaborative import from_checkpoint
from hookctl.learned.names import ldm_to_diffusers

SCENE = Scene((Thing("square", "red", centre=(32, 32)), Thing("star", "blue", centre=(96, 80))))


@dataclass
class File:
    tensors: dict[str, Tensor]


@cache
def task() -> CollaborationTask:
    torch.manual_seed(0)
    return CollaborationTask(Base("cpu"))


def test_masks_say_where_shapes_are_and_no_colours() -> None:
    ids = class_ids(SCENE)
    assert ids.shape == (16, 16) and ids[4, 4] == 2 and ids[10, 12] == 4 and ids[0, 0] == 0
    assert set(np.unique(ids)) == {0, 2, 4}


def test_names_are_those_of_the_official_file() -> None:
    unet = collaboration.build_network(12, 1, (16, 32, 32))
    state = unet.state_dict()
    named = ldm_names(state)
    assert len(named) == len(state) and all(k not in state for k in named)
    for key, tensor in named.items():
        assert state[ldm_to_diffusers(key, 1)] is not None
        assert torch.equal(state[ldm_to_diffusers(key, 1)], tensor)


@pytest.mark.slow
def test_the_dynamic_diffusers_alone_learn_of_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    module = task().module
    monkeypatch.setattr(collaboration, "BATCH", 4)

    def gradients(step: int) -> dict[str, bool]:
        module.zero_grad(set_to_none=True)
        task().loss(np.random.default_rng(0), step).backward()
        return {name: p.grad is not None for name, p in module.named_parameters()}

    first, later = gradients(0), gradients(collaboration.TOGETHER)
    assert all(first[name] == name.startswith("mask_unet.") for name in first)
    assert all(later[name] == name.startswith(("of_mask.", "of_text.")) for name in later)


@pytest.mark.slow
def test_the_loader_reads_what_is_written() -> None:
    """Beginning dynamic diffusers trust evenly; the mask's model is the one that was trained."""
    state, module = task().state(), task().module
    assert sum(t.numel() for t in state.values()) * 2 < 10e6
    pipe = hookctl.load_shapes(device="cpu")
    mask = torch.from_numpy(class_ids(SCENE))
    edit = from_checkpoint(File(state), pipe, mask=mask, guided=True, **SIZES)
    assert edit.names == ("mask", "text") and edit.models[1].model is None
    tokens = edit.models[0].condition
    assert tokens is not None
    torch.testing.assert_close(tokens, module.linear(task().maps([SCENE])).detach())
    with hookctl.control(pipe, edit):
        pipe("a red square and a blue star", num_inference_steps=2, output_type="latent")
    assert bool((edit.influence.of(0) == 0.5).all())
    x, t = torch.randn(1, 12, 16, 16), torch.tensor(500)
    unet = edit.models[0].model.module
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, tokens).sample, module.mask_unet(x, t, tokens).sample)


@pytest.mark.slow
def test_the_measure_reads_every_way(tmp_path: Path) -> None:
    save_file(task().state(), tmp_path / "collaboration.safetensors")
    found = measure(tmp_path / "collaboration.safetensors", 1, steps=2, device="cpu")
    assert list(found) == ["text", "mask", "mean", "collaboration"]
    assert all({"colour", "place", "both"} <= set(one) for one in found.values())
    assert found["mean"]["share early"] == 0.5 and "share late" not in found["mask"]
    assert found["collaboration"]["share early"] > 0.95  # the schedule, of untrained ones too
