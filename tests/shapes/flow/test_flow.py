"""The trainer of the flow-matching sibling: it learns, goes on, and a stock pipeline runs it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import hookctl
from hookctl.demos.shapes.captions import sample
from hookctl.demos.shapes.flow import looks
from hookctl.demos.shapes.flow.export import export
from hookctl.demos.shapes.flow.network import Size
from hookctl.demos.shapes.flow.training import Parts, Plan, Trainer, levels, noised
from hookctl.demos.shapes.haunting import haunted
from hookctl.demos.shapes.load import load_shapes_flow
from hookctl.demos.shapes.muon import orthogonalise
from hookctl.demos.shapes.world import SPACING, ghost

SECOND = 1.0 / 60.0  # in minutes
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts.embedded()


def tiny(parts: Parts, folder: Path, seconds: float, dtype: torch.dtype = torch.float32) -> Trainer:
    """One block, one head, batches of four; each step lasts a second by its clock."""
    ticks = itertools.count()
    plan = Plan(
        seconds * SECOND, folder, batch=4, dtype=dtype, size=Size(2, 1), warmup=2,
        log=lambda text: None, clock=lambda: float(next(ticks)),
    )  # fmt: skip
    return Trainer(plan, parts)


def trained(parts: Parts, folder: Path, steps: int = 3) -> Trainer:
    trainer = tiny(parts, folder, steps)
    for _ in range(steps):
        trainer.step()
    trainer.mean = [p.detach().clone() for p in trainer.parameters]  # nothing of the zeros is left
    return trainer


def test_encoder_gives_the_states_of_the_embedded_one(parts: Parts) -> None:
    pipe = hookctl.load_shapes(device="cpu")
    kept: list[torch.Tensor] = []
    norm = dict(pipe.text_encoder.named_modules())
    name = next(n for n in norm if n.endswith("final_layer_norm"))
    norm[name].register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    ids = parts.prompts.words([PROMPT])
    with torch.no_grad():
        pooled_ = pipe.text_encoder(ids).pooler_output
    states, pooled = parts.prompts([PROMPT])
    assert states.shape == (1, 33, 256) and not states[:, 32].any()
    assert states[:, :32].equal(torch.cat([kept[0]] * 2, -1))
    torch.testing.assert_close(pooled, torch.cat([pooled_] * 2, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_training_goes_on_as_if_it_had_not_been(
    parts: Parts, tmp_path: Path, dtype: torch.dtype
) -> None:
    whole, first = (tiny(parts, tmp_path / n, 6, dtype) for n in "ab")
    (tmp_path / "b").mkdir()
    for _ in range(3):
        first.step()
        first.spent += 1.0
    first.save()
    del first
    again = tiny(parts, tmp_path / "b", 6, dtype)
    again.resume()
    assert (again.steps, again.pictures, again.spent) == (3, 12, 3.0)
    for trainer, steps in ((whole, 6), (again, 3)):
        for _ in range(steps):
            trainer.step()
            trainer.spent += 1.0
    assert again.part == whole.part == 1.0
    for a, b in zip(again.parameters + again.mean, whole.parameters + whole.mean, strict=True):
        assert a.equal(b)
    assert all(a.equal(b) for a, b in zip(again.weights, whole.weights, strict=True))


@pytest.mark.slow
def test_it_learns_within_few_steps(parts: Parts, tmp_path: Path) -> None:
    trainer = tiny(parts, tmp_path, 60.0)
    trainer.plan.batch = 16
    before = looks.validation(trainer, 16, 16)
    for _ in range(25):
        trainer.step()
    after = looks.validation(trainer, 16, 16)
    # It begins at the variance of noise - latents, 2; strong noise is seen most, and read soonest.
    assert before["loss 0.75-1"] > 1.8 and after["loss 0.75-1"] < 0.85 * before["loss 0.75-1"]


def test_run_saves_looks_and_can_be_given_more_time(parts: Parts, tmp_path: Path) -> None:
    trainer = tiny(parts, tmp_path, 2)
    trainer.run(lambda t: {"step again": t.steps})
    assert trainer.part >= 1.0 and trainer.steps == 2
    again = tiny(parts, tmp_path, 8)
    again.resume()
    assert again.spent == trainer.spent and again.part < 1.0
    again.run(lambda t: {"step again": t.steps})
    told = json.loads((tmp_path / "measurements.json").read_text("utf-8"))
    assert [look["step again"] for look in told] == [2, again.steps] and again.steps > 2


def test_levels_and_targets() -> None:
    random = torch.Generator().manual_seed(0)
    s = levels(4096, random)
    assert 0.0 < s.min() and s.max() < 1.0 and 0.65 < s.mean() < 0.75
    z, seen, noise = torch.randn(3, 8, 2, 2, 2, generator=random)
    s = torch.linspace(0.1, 0.9, 8)
    x, target = noised(z, seen, noise, s)
    torch.testing.assert_close(x - s.view(-1, 1, 1, 1) * target, z)  # it leads to z, all along
    early = s <= 0.5
    assert target[early].equal((noise - z)[early])
    torch.testing.assert_close(noised(z, z, noise, s)[1], noise - z)


def test_ghosts_beside_stand_one_place_away(parts: Parts) -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(40):
        scene = sample(rng, 1)[0]
        made = ghost(scene, rng, beside=True)
        if made is not None:
            a, b = scene.things[0].centre, made[1].things[0].centre
            assert a != b and max(abs(p - q) for p, q in zip(a, b, strict=True)) == SPACING
            found += 1
    assert found > 20
    scenes = [sample(rng, 2)[0] for _ in range(8)]
    z = parts.encode(scenes)
    assert not haunted(scenes, z, parts.encode, rng, near=1.0).equal(z)


def test_many_matrices_are_orthogonalised_as_one_is() -> None:
    g = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(g), torch.stack([orthogonalise(x) for x in g]))
    values = torch.linalg.svdvals(orthogonalise(g, half=True))
    assert 0.5 < values.min() and values.max() < 1.4


def test_the_written_pipeline_is_what_was_trained(parts: Parts, tmp_path: Path) -> None:
    trainer = trained(parts, tmp_path)
    network = trainer.trained()
    with torch.no_grad():  # as they are on the disk
        for p in (*network.parameters(), *network.buffers()):
            p.copy_(p.half().float())
    trainer.mean = list(network.parameters())
    trainer._show(trainer.mean)
    trainer.network.pos_embed.pos_embed.copy_(network.pos_embed.pos_embed)
    folder = export(parts, network, tmp_path)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 30e6
    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert {part.dtype for part in (pipe.transformer, pipe.text_encoder, pipe.vae)} == {
        torch.float32
    }
    x = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    states, pooled = parts.prompts([PROMPT, ""])
    s = torch.tensor([0.3, 0.9])
    for zeros in (0, 77, 256):
        given, _, pools, _ = pipe.encode_prompt(
            [PROMPT, ""], None, None, max_sequence_length=zeros, do_classifier_free_guidance=False
        )
        assert given.shape == (2, 32 + zeros, 256)
        torch.testing.assert_close(given[:, :32], states[:, :32], rtol=0, atol=5e-3)  # fp16
        with torch.no_grad():
            # The same texts to both: here it is the network that is compared.
            tokens = torch.cat([states[:, :32], torch.zeros(2, zeros, 256)], 1)
            true = pipe.transformer(x, tokens, pooled, 1000 * s, return_dict=False)[0]
            made = trainer.predict(x, s, states, pooled, torch.full((2,), zeros))
        assert made.abs().max() > 0.01
        torch.testing.assert_close(made, true, rtol=0, atol=1e-5)
    pipe = load_shapes_flow("cpu", weights=folder)
    images = pipe(PROMPT, num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert images.shape == (1, 128, 128, 3) and np.isfinite(images).all()
    seeds = [torch.Generator().manual_seed(k) for k in (5, 6)]
    prompts = [PROMPT, "a green star"]
    latents = pipe(
        prompts, num_inference_steps=3, guidance_scale=3.0, generator=seeds, output_type="latent"
    ).images
    drawn = looks.draw(trainer, prompts, seed=5, steps=3)
    torch.testing.assert_close(drawn, latents, rtol=0, atol=0.02)  # the text weights are fp16


def test_figures_are_told(parts: Parts, tmp_path: Path) -> None:
    trainer = trained(parts, tmp_path, 1)
    before = [w.detach().clone() for w in trainer.weights]
    figures = looks.look(trainer, prompts=3, pictures=64)
    assert set(figures) == {
        "loss 0-0.25", "loss 0.25-0.5", "loss 0.5-0.75", "loss 0.75-1", "strict 1-2", "strict 3",
    }  # fmt: skip
    assert figures["loss 0.75-1"] > 0.5  # it has learned next to nothing
    assert all(w.equal(b) for w, b in zip(trainer.weights, before, strict=True))
