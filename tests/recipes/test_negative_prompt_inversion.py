"""Negative-prompt inversion: guided towards its own prompt, a row is drawn as if unguided."""

from __future__ import annotations

import pytest
import torch

import hookctl
from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes import DDIMInversion, NegativePromptInversion, ProximalGuidance
from tests.recipes.images import PROMPT, TARGET, counted, image, pipeline

STEPS = 4


def test_target_equal_to_source_is_unguided_ddim_bit_for_bit() -> None:
    pipe = pipeline()
    found = NegativePromptInversion(pipe, image(), PROMPT, steps=STEPS, guidance=7.5).run()
    plain = DDIMInversion(pipe, image(), PROMPT, steps=STEPS).run()
    assert torch.equal(found.latents, plain.latents)
    same = found.edit(pipe, prompts=[PROMPT] * 2, output_type="latent")
    # As many rows in a call: a sum may be rounded otherwise in a batch of another size.
    unguided = plain.edit(pipe, prompts=[PROMPT] * 4, guidance=1.0, output_type="latent")
    assert torch.equal(same, unguided[:2])


def test_edits_are_guided_away_from_the_source() -> None:
    pipe = pipeline()
    found = NegativePromptInversion(pipe, image(), PROMPT, steps=STEPS, guidance=4.0).run()
    program = found.program(pipe, [PROMPT, TARGET], 4.0)
    text = program.template.text("uncond")
    assert torch.equal(text[0], program.template.text("cond")[0])
    assert torch.equal(text[0], text[1])


def test_cost() -> None:
    pipe = pipeline()
    with counted(pipe) as rows:
        NegativePromptInversion(pipe, image(), PROMPT, steps=STEPS).run()
    assert rows == [1] * STEPS


# -- proximal guidance -----------------------------------------------------------------------------


def prox(delta: list[float], limit: float, **options: object) -> list[float]:
    editor = ProximalGuidance(0.5, **options)  # type: ignore[arg-type]
    given = torch.tensor(delta).reshape(1, -1)
    return editor._prox(given, torch.full((1, 1), limit))[0].tolist()


def test_thresholds_and_the_official_codes_forms() -> None:
    delta = [1.5, 2.5, -1.5, -2.5, 0.5]
    assert prox(delta, 1.0) == [0.5, 1.5, -0.5, -1.5, 0.0]
    assert prox(delta, 1.0, mode="hard") == [1.5, 2.5, -1.5, -2.5, 0.0]
    assert prox(delta, 1.0, mode="hard", paper=True) == [0.5, 1.5, -0.5, -1.5, 0.0]
    assert prox(delta, 1.0, mode="soft", paper=True) == [0.5, 0.5, 0.5, -0.5, 0.0]


def test_nothing_limited_is_nothing_done_and_all_limited_is_unconditional() -> None:
    pipe = pipeline()
    given = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "return_dict": False,
    }

    def draw(*editors: hookctl.Editor, **options: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        with hookctl.control(pipe, *editors):
            latents: torch.Tensor = pipe(PROMPT, generator=generator, **{**given, **options})[0]
        return latents

    plain = draw()
    assert torch.equal(draw(ProximalGuidance(0.0)), plain)
    limited = draw(ProximalGuidance(1.0))
    torch.testing.assert_close(limited, draw(ProximalGuidance(1.0, mode="hard")), atol=1e-5, rtol=0)
    assert not torch.equal(limited, plain)
    with pytest.raises(UnsupportedError, match="limits guidance"):
        draw(ProximalGuidance(0.5), guidance_scale=1.0)


def test_inversion_guidance_draws_unguided_places_to_the_path() -> None:
    pipe = pipeline()
    found = NegativePromptInversion(pipe, image(), PROMPT, steps=STEPS, guidance=4.0).run()
    limits = ProximalGuidance(1.0, path=found.path, rate=1.0, path_start=0.0, dilate=0)
    edited = found.edit(pipe, limits, prompts=[PROMPT, TARGET], output_type="latent")
    torch.testing.assert_close(edited, found.path[-1].expand_as(edited), atol=1e-6, rtol=0)


def test_proximal_belongs_to_the_inverted_image() -> None:
    pipe = pipeline()
    given = {"steps": STEPS, "guidance": 4.0}
    found = NegativePromptInversion(pipe, image(), PROMPT, proximal=0.7, **given).run()
    plain = NegativePromptInversion(pipe, image(), PROMPT, **given).run()
    prompts = [PROMPT, TARGET]
    limited = found.edit(pipe, prompts=prompts, output_type="latent")
    editor = ProximalGuidance(0.7)
    assert torch.equal(limited, plain.edit(pipe, editor, prompts=prompts, output_type="latent"))
    free = plain.edit(pipe, prompts=prompts, output_type="latent")
    assert (limited[1] - limited[0]).norm() < (free[1] - free[0]).norm()


def test_bad_input() -> None:
    with pytest.raises(InputError, match="quantile=2"):
        ProximalGuidance(2)
    with pytest.raises(InputError, match="mode='l0'"):
        ProximalGuidance(0.5, "l0")
    with pytest.raises(InputError, match="rate=-1"):
        ProximalGuidance(0.5, rate=-1)
