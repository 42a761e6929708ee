"""Every recipe on a model in half precision, as GPUs run it: as in float32, up to rounding."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch

import hookctl
from hookctl import recipes
from hookctl.errors import InputError
from tests.families.subjects import error
from tests.recipes import test_pairs
from tests.recipes.test_pairs import NAMES, PROMPTS, RECIPES, SD15, alone, second

# Relative, of the latents after two steps.
TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.15}
# Their masks, of what lies above a mean or a quantile, may differ in a cell, which has 4 channels.
MASKED = {"SAG": 4, "LEDITSPlusPlus": 4}


@cache
def pipe(dtype: torch.dtype) -> Any:
    return SD15.make().to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow  # every recipe in two precisions
def test_as_in_float32(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = alone(name)
    monkeypatch.setattr(test_pairs, "second", lambda: deepcopy(second()).to(dtype))
    with hookctl.control(pipe(dtype), RECIPES[name](recipes)):
        found = SD15.run(pipe(dtype), PROMPTS)
    beyond = (found - exact).abs() > TOLERANCE[dtype] * exact.abs().max()
    assert int(beyond.sum()) <= MASKED.get(name, 0)
    assert error(found, exact) < 0.2


def test_a_layout_model_of_another_dtype_is_refused() -> None:
    refused = pytest.raises(InputError, match="layout is a model in torch.float32.*torch.float16")
    with refused, hookctl.control(pipe(torch.float16), RECIPES["RealCompo"](recipes)):
        pass
