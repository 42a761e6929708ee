"""FireFlow: the official code in float64, its order and cost, its strategies, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes import FireFlow, RFInversion, RFSolver
from tests.recipes.images import counted, image
from tests.recipes.literal_features import edited
from tests.recipes.literal_flow import TOKENS, Flux
from tests.recipes.runs import made, relative

CAT, DOG = "a red cat", "a blue dog"
SHORT: dict[str, Any] = {"steps": 6, "arguments": {"max_sequence_length": TOKENS}}
TOLERANCE = 1e-10  # float64


def recipe(name: str = "flux", dtype: Any = torch.float32, **more: Any) -> FireFlow:
    return FireFlow(made(name, dtype), image(), more.pop("prompt", DOG), **{**SHORT, **more})


def latents(name: str = "flux", **more: Any) -> Tensor:
    found: Tensor = recipe(name, **more).run(output_type="latent")
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("strategy", "inject"),
    [
        (["replace_v"], 2),
        pytest.param(["replace_v"], 0, marks=SLOW),
        pytest.param(["add_q", "replace_k"], 2, marks=SLOW),
        pytest.param(["add_v", "add_k", "replace_q"], 6, marks=SLOW),
    ],
)
def test_paper_is_the_official_code(strategy: list[str], inject: int) -> None:
    pipe = made("flux", torch.float64)
    model = Flux(pipe, 6, 64)
    ratios = (0.9, 0.8, 1.0) if inject == 6 else (1.0, 1.0, 1.0)
    sharing: dict[str, Any] = {"inject": inject, "strategy": strategy, "ratios": ratios}
    prompts, scales = (CAT, DOG), (1.0, 2.0)
    x = model.encode(image())
    noise, want = edited(model, x, prompts, [0, 1], scales=scales, reuse=True, **sharing)
    ours = recipe(dtype=torch.float64, source_prompt=CAT, paper=True, **sharing)
    # Queries and keys are added behind the rotary embedding, which diffusers does in single.
    rotated = any(way[-1] in "qk" for way in strategy)
    assert relative(ours.invert(), noise) < TOLERANCE
    assert relative(ours.run(output_type="latent"), want) < (1e-6 if rotated else TOLERANCE)
    assert relative(want, x) > 1e-2


def test_one_prediction_a_step_and_one_more() -> None:
    ours = recipe("sd3", guidance=1.0)
    with counted(ours.pipe, "transformer") as rows:
        ours.run(output_type="latent")
    assert rows == [1] * 14


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "qwen_image"])
def test_a_round_trip_is_near_the_midpoint_rules(name: str) -> None:
    options = {**SHORT, "steps": 15, "guidance": 1.0, "source_prompt": CAT}
    ours = recipe(name, torch.float64, prompt=CAT, inject=0, **options)
    midpoint = RFSolver(ours.pipe, image(), CAT, inject=0, **options)
    euler = RFInversion(ours.pipe, image(), CAT, gamma=0.0, eta=0.0, **options)
    error, midpoints, eulers = (
        relative(one.run(output_type="latent"), ours.clean) for one in (ours, midpoint, euler)
    )
    assert error < 4 * midpoints and error * 5 < eulers


def test_strategies_and_ratios() -> None:
    plain = latents(inject=0, source_prompt=CAT)
    assert torch.equal(latents(strategy=[], source_prompt=CAT), plain)
    nothing = latents(strategy=["add_v"], ratios=(1, 1, 0), source_prompt=CAT)
    torch.testing.assert_close(nothing, plain, atol=1e-5, rtol=1e-5)
    for strategy in (["replace_v"], ["add_v"], ["replace_q", "replace_k"]):
        assert relative(latents(strategy=strategy, source_prompt=CAT), plain) > 1e-4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"inject": 7}, "FireFlow: inject=7; give a whole number from 0 to 6"),
        ({"strategy": "replace_v"}, "FireFlow: strategy='replace_v'; give a list of replace_q"),
        ({"strategy": ["replace_w"]}, r"FireFlow: strategy=\['replace_w'\]; give a list of"),
        ({"strategy": ["replace_v", "add_v"]}, "one for each of q, k and v"),
        ({"ratios": (1.0, 1.0)}, "FireFlow: ratios="),
        ({"memory": 1e-6}, "FireFlow: v of 2 sites at 1 moments take .* GB are memory=; give"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        latents(**options)


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline with .* is not; .*Direct"):
        recipe("sd15")
