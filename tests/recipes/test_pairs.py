"""Every two recipes on one pipeline: they run together, or are refused by name; no edit is lost.

A new recipe is added by a line in RECIPES.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Editor, recipes
from hookctl.errors import ConflictError, HookctlError, InputError, UnsupportedError
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from tests import zoo
from tests.families.subjects import error
from tests.marks import examples
from tests.recipes.images import image

SD15 = zoo.PIPELINES["sd15"]
PROMPTS = ["a red cat", "a blue cat"]
LEFT, RIGHT, TOP = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.5)


@cache
def second() -> Any:
    """A layout model: a denoiser with weights of its own."""
    unet = SD15.make().unet
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.05)
    return unet


# What makes each recipe act on the run that all of them share.
RECIPES: dict[str, Callable[[Any], Editor]] = {
    "APG": lambda r: r.APG(),
    "AttendAndExcite": lambda r: r.AttendAndExcite(["cat"], refinements=1),
    "BoxDiff": lambda r: r.BoxDiff(["cat"], [LEFT], refinements=1),
    "CFGZeroStar": lambda r: r.CFGZeroStar(),
    "DifferentialDiffusion": lambda r: r.DifferentialDiffusion(image(), LEFT, seed=0),
    "DyPE": lambda r: r.DyPE(base=2),
    "ConsiStory": lambda r: r.ConsiStory(PROMPTS, "cat", sites="self", dropped=0.0),
    "FDG": lambda r: r.FDG(),
    "FreeU": lambda r: r.FreeU(),
    "LEDITSPlusPlus": lambda r: r.LEDITSPlusPlus(["blue dog"], prompts=PROMPTS, scale=9.0),
    "LayoutGuidance": lambda r: r.LayoutGuidance(
        ["cat"], [LEFT], threshold=0.0, iterations=1, stop=0.5
    ),
    "MasaCtrl": lambda r: r.MasaCtrl(PROMPTS, start=0.0, sites="self"),
    "MaskedSelfAttention": lambda r: r.MaskedSelfAttention([LEFT, RIGHT]),
    "MultiDiffusion": lambda r: r.MultiDiffusion(tile=12, stride=4),
    "MultiInstanceSampler": lambda r: r.MultiInstanceSampler(["a dog"], [LEFT], share=0.5),
    "NAG": lambda r: r.NAG("a dog"),
    "OneWayFlow": lambda r: r.OneWayFlow({"seed": TOP}, [("rest", "seed", -4.0)]),
    "PAG": lambda r: r.PAG(sites="self @1/2"),
    "PromptSchedule": lambda r: r.PromptSchedule(["a red [cat:dog:0.5]", "a blue [cat:dog:0.5]"]),
    "PlugAndPlay": lambda r: r.PlugAndPlay(PROMPTS, feature_stop=1.0, query_stop=1.0),
    "PromptToPrompt": lambda r: r.PromptToPrompt(PROMPTS, self_replace=0.5, self_resolution=1.0),
    "ProximalGuidance": lambda r: r.ProximalGuidance(),
    "RIFLEx": lambda r: r.RIFLEx(k=1, paper=True),
    "RealCompo": lambda r: r.RealCompo(["cat"], [LEFT], second(), alone=0.0),
    "ReferenceOnly": lambda r: r.ReferenceOnly(PROMPTS, image()),
    "RegionalPrompts": lambda r: r.RegionalPrompts(["a dog"], [LEFT]),
    "SAG": lambda r: r.SAG(sites="self @1/2"),
    "STG": lambda r: r.STG(layers=[2]),
    "SEG": lambda r: r.SEG(sites="self @1/2"),
    "ScaleU": lambda r: r.ScaleU(backbone=[0.3], skip=[-0.3]),
    "StableFlow": lambda r: r.StableFlow(PROMPTS, sites="self up"),
    "SkipLayerGuidance": lambda r: r.SkipLayerGuidance(
        layers=[1], branch="slg", start=0.0, stop=1.0
    ),
    "StoryDiffusion": lambda r: r.StoryDiffusion(PROMPTS, start=0.0, plain=(0.0, 0.0)),
    "StyleAligned": lambda r: r.StyleAligned(PROMPTS),
    "TCFG": lambda r: r.TCFG(),
    "TPG": lambda r: r.TPG(),
}
# Those that rewrite rotary positions, which a UNet has not.
OF_POSITIONS = ("DyPE", "RIFLEx")
FOR_VIDEOS = {"PromptRelay"}  # refused for images (`test_prompt_relay`)
NAMES = [name for name in RECIPES if name in recipes.__all__ and name not in OF_POSITIONS]

# Inversions of an image, whose edits are drawn by a program under further editors.
INVERSIONS: dict[str, dict[str, Any]] = {
    "DDIMInversion": {},
    "DirectInversion": {},
    "EditFriendlyDDPM": {"skip": 0.0},
    "NegativePromptInversion": {},
    "NullTextInversion": {"iterations": 1},
}
BESIDE = ("FreeU", "MaskedSelfAttention", "PAG", "PromptToPrompt", "SAG", "SEG", "StyleAligned")


@cache
def pipe() -> Any:
    return SD15.make()


def draw(*names: str) -> Tensor:
    return draw_with(*(RECIPES[name](recipes) for name in names))


def draw_with(*editors: Editor, **options: Any) -> Tensor:
    with hookctl.control(pipe(), *editors):
        return SD15.run(pipe(), PROMPTS, **options)


@cache
def alone(name: str) -> Tensor:
    return draw(name)


# Of transformers alone: tests of their own.
ELSEWHERE = {"ConceptAttention"}


def test_every_editor_is_in_the_table() -> None:
    editors = {
        name
        for name in recipes.__all__
        if isinstance(getattr(recipes, name), type) and issubclass(getattr(recipes, name), Editor)
    }
    assert editors - FOR_VIDEOS <= set(RECIPES) | ELSEWHERE


@pytest.mark.parametrize("name", OF_POSITIONS)
def test_positions_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} rewrites rotary positions, and UNet2DCond"):
        draw(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_acts(name: str) -> None:
    assert error(alone(name), SD15.run(pipe(), PROMPTS)) > 1e-4


@pytest.mark.slow  # a run for each of two hundred pairs
@pytest.mark.parametrize("pair", list(itertools.combinations(NAMES, 2)), ids="-".join)
def test_pair(pair: tuple[str, str]) -> None:
    try:
        both = draw(*pair)
    except ConflictError as refusal:
        assert all(name in str(refusal) for name in pair)
        return
    for name, other in (pair, pair[::-1]):
        assert error(both, alone(other)) > 1e-5, f"nothing is left of {name} beside {other}"


@pytest.mark.parametrize("name", [name for name in INVERSIONS if name in recipes.__all__])
@pytest.mark.slow  # several runs for each inversion
def test_inversions_under_editors(name: str) -> None:
    """Every editor changes what is drawn beside an inverted image."""
    inversion = getattr(recipes, name)
    inverted = inversion(pipe(), image(), PROMPTS[0], steps=2, **INVERSIONS[name]).run()

    def edited(*editors: Editor) -> Tensor:
        given = {"prompts": PROMPTS, "guidance": 4.0, "output_type": "latent"}
        latents: Tensor = inverted.edit(pipe(), *editors, **given)
        return latents

    alone = edited()
    for other in BESIDE:
        if other in NAMES:
            assert error(edited(RECIPES[other](recipes)), alone) > 1e-5, other


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", ["MultiInstanceSampler", "SEG", "SAG", "FreeU", "PromptToPrompt", "RealCompo"]
)
def test_guidance_is_added_in_any_order(other: str) -> None:
    if other in NAMES:
        assert error(draw("PAG", other), draw(other, "PAG")) < 1e-4


# What draws by a loop of its own, under further editors.


def grown(name: str, *editors: Editor) -> Tensor:
    """Two scenes round one image."""
    images, options = [image(size=(64, 64))] * 2, {"steps": 4, "top": 0.75, "cycles": 1}
    program = getattr(recipes, name)(pipe(), images, PROMPTS, at=(64, 0), **options)
    latents: Tensor = program.run(*editors, output_type="latent")
    return latents


@cache
def fitted() -> Any:
    few = {"text_steps": 2, "text_rate": 0.1, "model_steps": 2, "model_rate": 0.01}
    return recipes.Imagic(pipe(), image(), PROMPTS[1], schedule_steps=2, **few).fit()


def imagined(*editors: Editor, changed: bool = True) -> Tensor:
    """Imagic's images at two strengths."""
    with hookctl.control(pipe(), *editors):
        latents: Tensor = fitted().draw((0.5, 1.0), steps=4, changed=changed, output_type="latent")
    return latents


BROUGHT = {"SelectiveOneWay": "OneWayFlow"}  # the editor by which a program claims something
# name -> its drawing under editors, and the same without what it brings itself.
PROGRAMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "CyclicOneWay": (partial(grown, "CyclicOneWay"), lambda *e: draw_with(*e, steps=4)),
    "Imagic": (imagined, partial(imagined, changed=False)),
    "SelectiveOneWay": (partial(grown, "SelectiveOneWay"), partial(grown, "CyclicOneWay")),
}


@cache
def program_alone(name: str) -> Tensor:
    return PROGRAMS[name][0]()


# One of each kind: an energy, features, maps of a source, regions, a guidance.
EVERYDAY = ("AttendAndExcite", "FreeU", "PromptToPrompt", "RegionalPrompts", "SAG")


@pytest.mark.parametrize("name", PROGRAMS)  # several runs for each of fifty pairs
@pytest.mark.parametrize("other", examples(NAMES, EVERYDAY))
def test_programs_under_editors(name: str, other: str) -> None:
    act, without = PROGRAMS[name]
    of_two = isinstance(RECIPES[other](recipes), SourceAndEdits | recipes.PromptSchedule)
    if name == "Imagic" and of_two:
        said = f"{other} (edits|begins with) .* but the pipeline was called"
        with pytest.raises(InputError, match=said):
            act(RECIPES[other](recipes))
        return
    try:
        both = act(RECIPES[other](recipes))
    except ConflictError as refusal:
        assert other in str(refusal) and BROUGHT.get(name, name) in str(refusal)
        return
    assert error(both, program_alone(name)) > 1e-5, f"nothing is left of {other} under {name}"
    bare = without(RECIPES[other](recipes))
    assert error(both, bare) > 1e-5, f"nothing is left of {name} with {other}"


@cache
def flowing() -> Any:
    return zoo.PIPELINES["sd3"].make()


def flowed(name: str, *editors: Editor) -> Tensor:
    """What a program of flow matching draws of one image under two texts."""
    options: dict[str, Any] = {"steps": 4, "arguments": {"max_sequence_length": 16}}
    if name == "FlowEdit":
        program: Any = recipes.FlowEdit(flowing(), image(), PROMPTS, n_max=4, **options)
    else:
        given = {"mask": LEFT, "skip": 1} if name == "KVEdit" else {}
        program = getattr(recipes, name)(flowing(), [image()] * 2, PROMPTS, **given, **options)
    latents: Tensor = program.run(*editors, output_type="latent")
    return latents


@pytest.mark.parametrize(
    "name", ["FireFlow", "FlowEdit", "KVEdit", "RFInversion", "RFSolver", "UniEditFlow"]
)
@pytest.mark.parametrize("other", examples(NAMES, EVERYDAY))
def test_flow_programs_under_editors(name: str, other: str) -> None:
    """What an editor does is seen, or it is refused by name."""
    try:
        both = flowed(name, RECIPES[other](recipes))
    except HookctlError as refusal:
        assert other in str(refusal)
        return
    assert error(both, flowed(name)) > 1e-6, f"nothing is left of {other} under {name}"


def test_nothing_stays_behind() -> None:
    assert error(SD15.run(pipe(), PROMPTS), SD15.run(SD15.make(), PROMPTS)) == 0
