"""Learned modules stack with each other and with recipes, and each keeps its effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionGLIGENPipeline

import hookctl
from hookctl import Editor
from hookctl.learned.gligen import GLIGEN
from hookctl.learned.instance_diffusion import InstanceDiffusion
from hookctl.learned.ip_adapter import IPAdapter
from hookctl.recipes import FreeU, PromptToPrompt, RealCompo, RegionalPrompts
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO
from tests.hookctl.learned.gated_models import gated_unet, network_of
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


@pytest.mark.slow
def test_real_compo_with_a_learned_layout_model() -> None:
    """The paper's own setting, a grounded model and a text model: learned hooks over the text
    model's own UNet do what diffusers' grounded pipeline does as a layout model."""
    gated = gated_unet()
    box = (0.1, 0.1, 0.5, 0.6)
    parts = SD15.make().components | {"unet": gated}
    del parts["image_encoder"]
    native = StableDiffusionGLIGENPipeline(**parts, requires_safety_checker=False)
    native.set_progress_bar_config(disable=True)
    arguments = {
        "gligen_phrases": ["cat"],
        "gligen_boxes": [list(box)],
        "gligen_scheduled_sampling_beta": 0.5,
    }
    pipe, layout = SD15.make(), SD15.make()
    layout.unet = pipe.unet
    grounding = GLIGEN(network_of(gated), boxes=[box], phrases=["cat"], stop=0.5)

    def mixed(layout: Any, **options: Any) -> torch.Tensor:
        with hookctl.control(pipe, RealCompo(["cat"], [box], layout, alone=0.25, **options)):
            return SD15.run(pipe, ["a red cat"], steps=4)

    plain = SD15.run(pipe, ["a red cat"], steps=4)
    want = mixed(native, layout_arguments=arguments)
    with hookctl.control(layout, grounding):
        assert error(mixed(layout), want) < 1e-4
        assert torch.equal(SD15.run(pipe, ["a red cat"], steps=4), plain)
    assert error(mixed(layout), want) > 1e-3
