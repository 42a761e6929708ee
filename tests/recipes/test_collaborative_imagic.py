"""Collaborative editing: unfitted it is the collaboration, fitted the paper's stages by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

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
LITERAL: dict[str, Any] = {
    **FEW,
    "text_rate": 1e-2,
    "rank": 2,
    "layers": "attn2.to_k",
}
NONE = {**FEW, "text_steps": 0, "model_steps": 0}


def models(pipe: Any, weights: bool = False) -> list[Collaborator]:
    """One of its own condition, and the pipeline's own."""
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


def _noisy(pipe: Any, clean: Tensor, step: int, stage: int) -> tuple[Tensor, Tensor, Tensor]:
    """The image at the level of a training step: its latents, their timestep and their noise."""
    generator = torch.Generator().manual_seed(2 * step + stage)
    share = float(torch.rand((), generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    pipe.scheduler.set_timesteps(FEW["schedule_steps"])
    t = pipe.scheduler.timesteps[int(share * FEW["schedule_steps"])]
    kept = pipe.scheduler.alphas_cumprod[t]
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise, t, noise


def by_hand(
    pipe: Any, unet: Any, clean: Tensor, wanted: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stages A and B of one model: its fitted embedding, and its changed weights."""
    fitted = wanted.clone().requires_grad_(True)
    adam = torch.optim.Adam([fitted], lr=LITERAL["text_rate"])
    for step in range(LITERAL["text_steps"]):
        x, t, noise = _noisy(pipe, clean, step, 0)
        adam.zero_grad()
        (unet(x, t, fitted).sample - noise).square().mean().backward()
        adam.step()
    fitted = fitted.detach()
    generator, pairs = torch.Generator().manual_seed(0), {}
    for path, module in unet.named_modules():
        if path.endswith(LITERAL["layers"]):
            a = torch.randn(2, module.in_features, generator=generator) / 2  # by the rank
            pairs[path] = a, torch.zeros(module.out_features, 2)
    leaves = [x.requires_grad_(True) for pair in pairs.values() for x in pair]
    adam = torch.optim.Adam(leaves, lr=LITERAL["model_rate"])

    def weights() -> dict[str, Tensor]:
        own = dict(unet.named_parameters())
        return {f"{p}.weight": own[f"{p}.weight"] + b @ a for p, (a, b) in pairs.items()}

    for step in range(LITERAL["model_steps"]):
        x, t, noise = _noisy(pipe, clean, step, 1)
        adam.zero_grad()
        predicted = functional_call(unet, weights(), (x, t, fitted)).sample
        (predicted - noise).square().mean().backward()
        adam.step()
    return fitted, {name: x.detach() for name, x in weights().items()}


@pytest.mark.slow
def test_all_stages_are_the_paper_by_hand() -> None:
    """Written out in torch and diffusers alone: embeddings, weights, and what is drawn of them."""
    pipe, alphas = pipeline(), torch.tensor([0.0, 0.7, 1.5]).reshape(3, 1, 1)
    given = models(pipe)
    edit = CollaborativeImagic(pipe, given, image(), TARGET, **LITERAL).fit()
    drawn = edit.draw(alphas.flatten().tolist(), steps=3, seed=4, output_type="latent")

    pixels = torch.from_numpy(np.array(image())).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        prompt = pipe.encode_prompt(TARGET, "cpu", 1, False)[0]
    told, changed = {}, {}
    for one, unet, wanted in ((given[0], given[0].model, tokens(1)), (given[1], pipe.unet, prompt)):
        fitted, changed[one.name] = by_hand(pipe, unet, clean, wanted)
        ours = edit.fitted[one.name]
        torch.testing.assert_close(ours.fitted, fitted, rtol=1e-4, atol=1e-5)
        for path, (a, b) in ours.change.factors.items():
            own = unet.get_submodule(path).weight
            weight = changed[one.name][f"{path}.weight"]
            torch.testing.assert_close(own + b @ a, weight, rtol=1e-4, atol=1e-5)
            assert not torch.equal(own, weight)
        told[one.name] = alphas * wanted + (1 - alphas) * fitted
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4)).repeat(3, 1, 1, 1)
    pipe.scheduler.set_timesteps(3)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            asked = [one.influence(x, t, told[one.name]).sample for one in given]  # type: ignore
            each = [
                functional_call(unet, changed[one.name], (x, t, told[one.name])).sample
                for one, unet in zip(given, (given[0].model, pipe.unet), strict=True)
            ]
        shares = torch.cat(asked, 1).softmax(1)
        mixed = shares[:, :1] * each[0] + shares[:, 1:] * each[1]
        x = pipe.scheduler.step(mixed, t, x).prev_sample
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)
    assert (drawn[0] - drawn[2]).abs().max() > 1e-2


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
