"""Learned modules stack with each other and with recipes, and each keeps its effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hookctl
from hookctl import Editor
from hookctl.learned.instance_diffusion import InstanceDiffusion
from hookctl.learned.ip_adapter import IPAdapter
from hookctl.recipes import FreeU, PromptToPrompt, RegionalPrompts
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO
from tests.hookctl.learned.identity import adapter
from tests.hookctl.learned.test_instance_diffusion import CAT, DOG, network


def face(pipe: Any) -> torch.Tensor:
    width = adapter("base", pipe.unet).image_proj.proj.in_features
    return torch.randn(1, width, generator=torch.Generator().manual_seed(3))


STACK: dict[str, Callable[[Any], Editor]] = {
    "grounding": lambda pipe: InstanceDiffusion(network(), [CAT, DOG], stop=1.0),
    "identity": lambda pipe: IPAdapter(adapter("base", pipe.unet), face(pipe), scale=0.7),
    "regions": lambda pipe: RegionalPrompts(["a red cat"], [(0.0, 0.0, 0.5, 1.0)]),
    "words": lambda pipe: PromptToPrompt(TWO),
    "features": lambda pipe: FreeU(),
}


def run(pipe: Any, *names: str) -> tuple[torch.Tensor, str]:
    with hookctl.control(pipe, *(STACK[name](pipe) for name in names)) as session:
        found = SD15.run(pipe, TWO)
    return found, session.report()


@pytest.mark.slow
def test_all_at_once_each_keeps_its_effect() -> None:
    """Leaving any of them out changes the result; everybody is in the report."""
    pipe = SD15.make()
    plain = SD15.run(pipe, TWO)
    together, report = run(pipe, *STACK)
    for name in STACK:
        rest, _ = run(pipe, *(other for other in STACK if other != name))
        assert error(rest, together) > 1e-4, name
    for editor in ("InstanceDiffusion", "IPAdapter", "RegionalPrompts", "PromptToPrompt", "FreeU"):
        assert editor in report
    assert "never acted" not in report
    assert torch.equal(SD15.run(pipe, TWO), plain)


@pytest.mark.slow
def test_two_of_a_kind_add() -> None:
    """Two adapters, or two groundings: the second does not overwrite the first."""
    pipe = SD15.make()
    for name in ("grounding", "identity"):
        one, _ = run(pipe, name)
        two, _ = run(pipe, name, name)
        assert error(two, one) > 1e-4
