"""Collaborative editing: unfitted it is the collaboration, fitting moves each modality alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hookctl
from hookctl.errors import InputError
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator
from hookctl.learned.weights import Weights
from hookctl.recipes.collaborative_imagic import CollaborativeImagic
from tests.families.fingerprint import differences, fingerprint
from tests.hookctl.learned.test_collaborative import network, tokens
from tests.recipes.images import TARGET, image, pipeline
from tests.recipes.test_real_compo import other

FEW: dict[str, Any] = {
    "text_steps": 2,
    "model_steps": 2,
    "model_rate": 1e-2,
    "schedule_steps": 4,
}
NONE = {**FEW, "text_steps": 0, "model_steps": 0}


def models(pipe: Any, weights: bool = False) -> list[Collaborator]:
    second: Any = other(pipe)
    if weights:
        second = Weights(second)
    return [
        Collaborator("mask", network(1), second, tokens(1), tokens(2)),
        Collaborator("text", network(2)),
    ]


@pytest.mark.slow
def test_nothing_fitted_is_the_collaboration() -> None:
    pipe = pipeline()
    given = models(pipe)
    edit = CollaborativeImagic(pipe, given, image(), TARGET, guidance=3.0, **NONE).fit()
    drawn = edit.draw((0.0, 1.0, 2.0), steps=2, seed=1, output_type="latent")
    collaboration = CollaborativeDiffusion(given)
    with hookctl.control(pipe, collaboration):
        want = pipe(
            [TARGET] * 3,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(1) for _ in range(3)],
            output_type="latent",
        ).images
    torch.testing.assert_close(drawn, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(edit.influence.of(1), collaboration.influence.of(1))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [False, True])
def test_each_modality_is_fitted_and_nothing_is_left(weights: bool, tmp_path: Path) -> None:
    pipe = pipeline()
    given = models(pipe, weights)
    second = given[0].model.module if weights else given[0].model
    before, own = fingerprint(pipe), [p.clone() for p in second.parameters()]
    seen: list[str] = []
    path = tmp_path / "fit.safetensors"
    edit = CollaborativeImagic(
        pipe, CollaborativeDiffusion(given, paper=True), image(), TARGET, checkpoint=path, **FEW
    ).fit(lambda stage, *_: seen.append(stage))
    assert list(dict.fromkeys(seen)) == ["mask text", "mask model", "text text", "text model"]
    drawn = edit.draw((0.0, 1.0), steps=2, output_type="latent")
    plain = edit.draw((0.0, 1.0), steps=2, changed=False, output_type="latent")
    assert edit.editor.paper and not torch.equal(drawn, plain)
    assert not torch.equal(drawn[0], drawn[1])
    for one in edit.fitted.values():
        assert not torch.equal(one.fitted, one.text(1.0))
        assert any(bool(b.any()) for _, b in one.change.factors.values())
    assert torch.equal(edit.fitted["mask"].text(1.0), tokens(1))
    assert {p.name for p in tmp_path.iterdir()} == {"fit-mask.safetensors", "fit-text.safetensors"}
    assert all(torch.equal(a, b) for a, b in zip(own, second.parameters(), strict=True))
    assert not differences(before, fingerprint(pipe))


def test_bad_input() -> None:
    pipe = pipeline()
    second = other(pipe)

    def refused(match: str, *given: Collaborator, **more: Any) -> None:
        with pytest.raises(InputError, match=match):
            CollaborativeImagic(pipe, list(given), more.pop("image", image()), TARGET, **more)

    refused("'mask' is a pipeline", Collaborator("mask", None, pipeline()))
    refused("for 2 images, and there is one", Collaborator("mask", None, second, tokens(1, 2)))
    twice = [Collaborator(name, None, second, tokens(1)) for name in ("mask", "sketch")]
    refused("'sketch' is that of another modality", *twice)
    refused("give a list of Collaborator")
    refused("give a PIL image", Collaborator("text"), image="x")
    refused("Imagic: rank=0|rank=0", Collaborator("text"), rank=0)
