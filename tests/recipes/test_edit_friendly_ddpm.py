"""Edit-friendly DDPM inversion: the noise leads back, and is what the paper says it is."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.noise import Noise
from hookctl.recipes import EditFriendlyDDPM, PromptToPrompt
from tests.recipes.images import PROMPT, TARGET, counted, image, pipeline

STEPS = 6


def test_the_source_is_the_image() -> None:
    pipe = pipeline()
    found = EditFriendlyDDPM(pipe, image(), PROMPT, steps=STEPS, skip=0.34, seed=3).run()
    assert found.start == 2
    assert (found.reconstruct(pipe, "latent") - found.path[-1]).abs().max() < 1e-4
    edit = PromptToPrompt([PROMPT, TARGET])
    source, edited = found.edit(pipe, edit, output_type="latent")
    assert (source - found.path[-1][0]).abs().max() < 1e-4
    assert (edited - source).abs().max() > 1e-2


def test_with_a_second_order_solver_as_in_ledits() -> None:
    pipe = pipeline("sd15", DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++")
    found = EditFriendlyDDPM(pipe, image(), PROMPT, steps=STEPS, skip=0.0).run()
    assert (found.reconstruct(pipe, "latent") - found.path[-1]).abs().max() < 1e-4


def test_noise_is_what_leads_from_one_independent_level_to_the_next() -> None:
    """z = (x' - mu) / sigma with the published sigma of eta = 1."""
    pipe = pipeline()
    found = EditFriendlyDDPM(pipe, image(), PROMPT, steps=STEPS, skip=0.0, seed=3).run()
    program = found.program(pipe, [PROMPT], 3.5)
    noise = Noise(pipe.scheduler)
    levels, i = noise.levels(), 2
    x, after = found.path[i].double(), found.path[i + 1].double()
    with torch.no_grad():
        x0, eps = noise.split(x, program.predict(found.path[i], i, 3.5).double(), levels[i])
    a, a_next = levels[i].signal ** 2, levels[i + 1].signal ** 2
    sigma = ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
    mean = a_next**0.5 * x0 + (1 - a_next - sigma**2) ** 0.5 * eps
    z = found.corrections[i].noise
    torch.testing.assert_close(z.double(), (after - mean) / sigma, atol=1e-3, rtol=1e-3)
    assert not found.corrections[-1].noise.any()


def test_the_levels_are_noised_independently() -> None:
    pipe = pipeline()
    found = EditFriendlyDDPM(pipe, image(), PROMPT, steps=STEPS, skip=0.0).run()
    levels, clean = Noise(pipe.scheduler).levels(), found.path[-1]
    first = zip(found.path[:3], levels, strict=False)
    xi = [(x - level.signal * clean) / level.noise for x, level in first]
    for a, b in zip(xi, xi[1:], strict=False):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.1
        assert abs(float(a.std()) - 1) < 0.1


def test_paper_lets_the_last_residual_go() -> None:
    pipe = pipeline()
    given = {"steps": STEPS, "skip": 0.0}
    paper = EditFriendlyDDPM(pipe, image(), PROMPT, paper=True, **given).run()
    assert all(c.target is None for c in paper.corrections)
    error = (paper.reconstruct(pipe, "latent") - paper.path[-1]).abs().max()
    assert 1e-4 < error < 1.0


def test_seeds_and_cost() -> None:
    pipe = pipeline()
    with counted(pipe) as rows:
        one = EditFriendlyDDPM(pipe, image(), PROMPT, steps=STEPS, skip=0.5, seed=1).run()
    assert rows == [2] * 3
    again = EditFriendlyDDPM(pipe, image(), PROMPT, steps=STEPS, skip=0.5, seed=1).run()
    other = EditFriendlyDDPM(pipe, image(), PROMPT, steps=STEPS, skip=0.5, seed=2).run()
    assert torch.equal(one.latents, again.latents)
    assert not torch.equal(one.latents, other.latents)


def test_bad_input() -> None:
    pipe = pipeline()
    with pytest.raises(InputError, match="skip"):
        EditFriendlyDDPM(pipe, image(), PROMPT, skip=1.0)
    with pytest.raises(InputError, match="eta=0"):
        EditFriendlyDDPM(pipe, image(), PROMPT, eta=0)
    euler = pipeline("sd15", EulerDiscreteScheduler)
    with pytest.raises(UnsupportedError, match="use DDIMScheduler"):
        EditFriendlyDDPM(euler, image(), PROMPT, steps=3).run()


def test_noise_does_not_depend_on_images_beside() -> None:
    pipe, options = pipeline(), {"steps": 4, "skip": 0.0, "seed": 3}
    alone = EditFriendlyDDPM(pipe, image(1), TARGET, **options).run()
    _, beside = EditFriendlyDDPM(pipe, [image(), image(1)], [PROMPT, TARGET], **options).run()
    for one, other in zip(alone.path, beside.path, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
