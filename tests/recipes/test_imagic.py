"""Imagic: the base model is never touched, fitting lowers the loss, and can be taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hookctl.errors import InputError
from hookctl.recipes import Imagic
from tests.families.fingerprint import differences, fingerprint
from tests.recipes.pictures import TARGET, picture, pipeline

FEW: dict[str, Any] = {
    "text_steps": 3,
    "model_steps": 3,
    "model_rate": 1e-2,
    "schedule_steps": 5,
}


def weights(pipe: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in pipe.unet.parameters()]


def test_weights_and_flags_are_as_they_were() -> None:
    pipe = pipeline()
    pipe.unet.conv_in.requires_grad_(False)
    before, own = fingerprint(pipe), weights(pipe)
    edit = Imagic(pipe, picture(), TARGET, **FEW).fit()
    edit.draw((0.0, 1.0), steps=2, output_type="latent")
    assert all(torch.equal(a, b) for a, b in zip(own, pipe.unet.parameters(), strict=True))
    assert not differences(before, fingerprint(pipe))
    assert all(bool(b.any()) for _, b in edit.change.factors.values())


def test_nothing_fitted_is_the_plain_pipeline() -> None:
    pipe = pipeline()
    edit = Imagic(pipe, picture(), TARGET, **{**FEW, "text_steps": 0, "model_steps": 0}).fit()
    drawn = edit.draw((0.0,), steps=2, seed=1, output_type="latent")
    plain = pipe(
        TARGET,
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    assert torch.equal(drawn, plain)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_fitting_lowers_the_loss(kind: str) -> None:
    pipe = pipeline()
    pipe.scheduler.register_to_config(prediction_type=kind)
    given = {**FEW, "text_steps": 30, "model_steps": 30}
    edit = Imagic(pipe, picture(), TARGET, **given)

    def loss() -> float:
        with torch.no_grad(), edit.change.applied():
            many = [edit._loss(torch.Generator().manual_seed(i)) for i in range(8)]
        return float(sum(many))

    before = loss()
    assert loss() == before
    edit.fit()
    assert loss() < before


def test_a_checkpoint_is_taken_up(tmp_path: Path) -> None:
    pipe, path = pipeline(), tmp_path / "fit.safetensors"
    first = Imagic(pipe, picture(), TARGET, checkpoint=path, save_every=1, **FEW).fit()
    told: list[Any] = []
    again = Imagic(pipe, picture(), TARGET, checkpoint=path, **FEW).fit(
        lambda *said: told.append(said)
    )
    assert not told
    assert torch.equal(again.fitted, first.fitted)
    for a, b in zip(again.change.tensors, first.change.tensors, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="was fitted to"):
        Imagic(pipe, picture(), "a dog", checkpoint=path, **FEW).fit()


def test_bad_input() -> None:
    pipe = pipeline()
    with pytest.raises(InputError, match="matches no linear layer"):
        Imagic(pipe, picture(), TARGET, layers="nothing")
    with pytest.raises(InputError, match="rank=0"):
        Imagic(pipe, picture(), TARGET, rank=0)
    with pytest.raises(InputError, match="target="):
        Imagic(pipe, picture(), [TARGET])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="alphas"):
        Imagic(pipe, picture(), TARGET, **FEW).draw(())
