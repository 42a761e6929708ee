"""Inverted noise brought to mean 0 and variance 1, from which a flow-matching model starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookctl.recipes import FireFlow, RFSolver, UniEditFlow
from tests.recipes.images import image
from tests.recipes.literal_flow import TOKENS
from tests.recipes.runs import made, relative

PROMPTS = ["a blue dog", "a red cat"]


@pytest.mark.parametrize("recipe", [RFSolver, FireFlow, UniEditFlow])
def test_unit_noise(recipe: Any) -> None:
    """Image by image, at the level that the edit starts from; what the image adds is as it was."""
    pipe, given = made("sd3"), {"steps": 5, "arguments": {"max_sequence_length": TOKENS}}
    images = [image(), image().rotate(90)]
    plain, ours = (recipe(pipe, images, PROMPTS, unit_noise=u, **given) for u in (False, True))
    level = pipe.scheduler.sigmas[5 - getattr(ours, "taken", 5)].item()
    before, after = ((p.invert() - (1 - level) * p.clean) / level for p in (plain, ours))
    for old, new in zip(before, after, strict=True):
        spread, mean = torch.std_mean(new, correction=0)
        assert abs(spread - 1) < 1e-5 and abs(mean) < 1e-5
        assert relative(new, (old - old.mean()) / old.std(correction=0)) < 1e-5
        assert abs(old.std() - 1) > 1e-3


@pytest.mark.parametrize("recipe", [RFSolver, FireFlow, UniEditFlow])
def test_unit_noise_is_what_is_drawn_from(recipe: Any) -> None:
    pipe, given = made("sd3"), {"steps": 3, "arguments": {"max_sequence_length": TOKENS}}
    plain, ours = (
        recipe(pipe, image(), PROMPTS[0], unit_noise=u, **given).run(output_type="latent")
        for u in (False, True)
    )
    assert relative(ours, plain) > 1e-3
