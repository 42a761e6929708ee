"""Which part of a training file is the model, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hookctl.errors import InputError
from hookctl.learned.files import Checkpoint
from hookctl.learned.reading.parts import choose


def parted(*keys: str) -> Checkpoint:
    return Checkpoint(Path("a.ckpt"), {key: torch.ones(2) for key in keys})


def test_the_part_that_is_the_model() -> None:
    found = choose(parted("model.x", "opt.state.0.exp_avg", "text_encoder.y", "opt.state.1.z"))
    assert list(found.tensors) == ["x"]
    assert found.notes == (
        "of the file, 'model' is used: 1 tensors",
        "left out: opt (2), text_encoder (1)",
    )
    both = parted("model.x", "model.y", "ema.x", "ema.y")
    assert "'ema' is used" in choose(both).notes[0] and "model (2)" in choose(both).notes[1]
    assert "'model' is used" in choose(both, "model").notes[0]
    assert "'model' is used" in choose(parted("model.x", "model.y", "ema.x")).notes[0]
    with pytest.raises(InputError, match="weights='ema', and the file holds none of these"):
        choose(parted("model.x"), "ema")
    with pytest.raises(InputError, match="weights='ema', and the file holds one set"):
        choose(parted("x"), "ema")
    with pytest.raises(InputError, match="weights='best'; give 'model' or 'ema'"):
        choose(parted("x"), "best")


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        (["state_dict.model.diffusion_model.out.0.x", "state_dict.first_stage_model.y"], "out.0.x"),
        (["model.diffusion_model.out.0.x", "model_ema.y", "cond_stage_model.z"], "out.0.x"),
        (["control_model.zero_convs.0", "model.diffusion_model.y"], "zero_convs.0"),
        (["state_dict.model.mask_unet.diffusion_model.x"], "model.mask_unet.diffusion_model.x"),
        (["module.image_proj_model.x"], "image_proj_model.x"),
        (["image_proj.x"], "image_proj.x"),
    ],
)
def test_prefixes(keys: list[str], kept: str) -> None:
    assert list(choose(parted(*keys)).tensors) == [kept]
