"""Imagic: the base model is never touched, fitting lowers the loss, and can be taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from hookctl.address.rows import COND
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import Imagic
from tests.families.fingerprint import differences, fingerprint
from tests.recipes.images import TARGET, image, pipeline

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
    edit = Imagic(pipe, image(), TARGET, **FEW).fit()
    edit.draw((0.0, 1.0), steps=2, output_type="latent")
    assert all(torch.equal(a, b) for a, b in zip(own, pipe.unet.parameters(), strict=True))
    assert not differences(before, fingerprint(pipe))
    assert all(bool(b.any()) for _, b in edit.change.factors.values())


def test_nothing_fitted_is_the_plain_pipeline() -> None:
    pipe = pipeline()
    edit = Imagic(pipe, image(), TARGET, **{**FEW, "text_steps": 0, "model_steps": 0}).fit()
    drawn = edit.draw((0.0,), steps=2, seed=1, output_type="latent")
    plain = pipe(
        TARGET,
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    assert torch.equal(drawn, plain)


def test_every_trained_level_whatever_the_offset() -> None:
    pipe = pipeline(scheduler=DDIMScheduler, steps_offset=1)
    before = pipe.scheduler
    edit = Imagic(pipe, image(), TARGET, **{**FEW, "schedule_steps": 1000})
    assert edit.fitting.program.noise.timesteps == list(range(999, -1, -1))
    assert pipe.scheduler is before
    edit.fit().draw((0.5,), steps=2, output_type="latent")


@pytest.mark.slow
def test_inverted_alpha_0_leads_back_at_any_guidance() -> None:
    """It follows the fitted text from its inverted noise; the other alphas leave that path."""
    pipe = pipeline(scheduler=DDIMScheduler, clip_sample=False)
    edit = Imagic(pipe, image(), TARGET, **{**FEW, "text_rate": 0.1}).fit()
    given: dict[str, Any] = {"steps": 3, "inverted": True, "output_type": "latent"}
    with edit.change.applied():
        noise = edit.inverted_noise(3, 2)
        program = Trajectory(pipe, TARGET, steps=3, latents=noise, **edit.size)
        wanted = program.run(contexts={COND: edit.fitted})
    for guidance in (1.0, 7.5):
        same, other = edit.draw((0.0, 1.0), guidance=guidance, **given)
        torch.testing.assert_close(same, wanted[0], rtol=1e-4, atol=1e-4)
        assert (other - same).abs().max() > 1e-2


def test_inverted_needs_a_first_order_scheduler() -> None:
    pipe = pipeline(scheduler=DPMSolverMultistepScheduler)
    edit = Imagic(pipe, image(), TARGET, **FEW)
    with pytest.raises(UnsupportedError, match="first-order"):
        edit.draw((0.0,), steps=3, inverted=True)


def test_the_window_and_the_samples_of_a_step() -> None:
    edit = Imagic(pipeline(), image(), TARGET, schedule_steps=10, window=(0.2, 0.6), samples=4)
    asked: list[int] = []
    predict = edit.fitting.program.predict
    edit.fitting.program.predict = lambda x, i, *rest: asked.append(i) or predict(x, i, *rest)  # type: ignore
    with torch.no_grad():
        losses = list(edit.fitting._losses(torch.Generator().manual_seed(0)))
    assert asked == [2, 3, 4, 5] and len(losses) == 4


@pytest.mark.slow
def test_noises_of_a_level_share_its_text_and_model() -> None:
    """Their loss is the mean of those that they have one by one."""
    pipe = pipeline()
    one, many = (Imagic(pipe, image(), TARGET, noises=n, **FEW) for n in (1, 3))
    drawn: list[torch.Tensor] = []
    predict = many.fitting.program.predict
    many.fitting.program.predict = lambda x, *rest: drawn.append(x) or predict(x, *rest)  # type: ignore
    with torch.no_grad():
        (loss,) = many.fitting._losses(torch.Generator().manual_seed(0))
        (x,), level = drawn, many.fitting.program.levels[_level(many)]
        alone = []
        for noisy in x.split(1):
            eps = (noisy - level.signal * one.clean) / level.noise
            got = one.fitting.program.predict(noisy, _level(many), 1.0, {COND: one.fitted})
            wanted = one.fitting.program.noise.join(one.clean, eps, level)
            alone.append(float((got - wanted).square().mean()))
    assert len(x) == 3 and not torch.equal(x[0], x[1])
    assert float(loss) == pytest.approx(sum(alone) / 3, rel=1e-3)
    assert many.fit().draw((0.0, 1.0), steps=2, output_type="latent").shape[0] == 2


def _level(edit: Imagic) -> int:
    """The level that a step with the generator's seed 0 trains."""
    share = float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    return int(share * edit.fitting.program.steps)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.slow  # a training
def test_fitting_lowers_the_loss(kind: str) -> None:
    pipe = pipeline()
    pipe.scheduler.register_to_config(prediction_type=kind)
    given = {**FEW, "text_steps": 15, "model_steps": 15}
    edit = Imagic(pipe, image(), TARGET, **given)

    def loss() -> float:
        with torch.no_grad(), edit.change.applied():
            many = [sum(edit.fitting._losses(torch.Generator().manual_seed(i))) for i in range(4)]
        return float(sum(many))

    before = loss()
    assert loss() == before
    edit.fit()
    assert loss() < before


def test_a_checkpoint_is_taken_up(tmp_path: Path) -> None:
    pipe, path = pipeline(), tmp_path / "fit.safetensors"
    first = Imagic(pipe, image(), TARGET, checkpoint=path, save_every=1, **FEW).fit()
    progress: list[Any] = []
    again = Imagic(pipe, image(), TARGET, checkpoint=path, **FEW).fit(
        lambda *done: progress.append(done)
    )
    assert not progress
    assert torch.equal(again.fitted, first.fitted)
    for a, b in zip(again.change.tensors, first.change.tensors, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="was fitted to"):
        Imagic(pipe, image(), "a dog", checkpoint=path, **FEW).fit()


def test_bad_input() -> None:
    pipe = pipeline()
    with pytest.raises(InputError, match="matches no linear or conv"):
        Imagic(pipe, image(), TARGET, layers="nothing")
    with pytest.raises(InputError, match="rank=0"):
        Imagic(pipe, image(), TARGET, rank=0)
    with pytest.raises(InputError, match="prompt="):
        Imagic(pipe, image(), [TARGET])  # type: ignore[arg-type]
    for wrong in ({"window": (0.5, 0.5)}, {"window": (0.0, 1.5)}, {"samples": 0}, {"noises": 0}):
        (name,) = wrong
        with pytest.raises(InputError, match=f"Imagic: {name}="):
            Imagic(pipe, image(), TARGET, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="alphas"):
        Imagic(pipe, image(), TARGET, **FEW).draw(())
