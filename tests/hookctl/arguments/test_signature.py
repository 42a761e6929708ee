"""All arguments of a call by their hints and names, and the mistakes that people make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import hookctl
from hookctl import Trajectory, control
from hookctl.arguments import checked
from hookctl.arguments.signature import described, fits
from hookctl.errors import InputError, SelectorError
from hookctl.recipes import (
    PAG,
    SAG,
    SEG,
    BoxDiff,
    DDIMInversion,
    FreeU,
    Imagic,
    MasaCtrl,
    MaskedSelfAttention,
    OneWayFlow,
    PromptToPrompt,
    RegionalPrompts,
    ScaleU,
    StyleAligned,
)
from tests import zoo

TWO = ["a red cat", "a red dog"]
HALF = (0, 0, 0.5, 1)

FITTING: list[tuple[Any, Any, bool]] = [
    (True, bool, True),
    ("false", bool, False),
    (1, bool, False),
    (2.9, int, False),
    (np.int64(3), int, True),
    (True, int, False),
    (2**70, int, False),
    (1, float, True),
    (10**400, float, False),
    (math.nan, float, False),
    ("0.5", float, False),
    ("a\ud800", str, False),
    (None, float | None, True),
    ("x", Literal["x", "y"], True),
    ("z", Literal["x", "y"], False),
    ("ab", Sequence[str], False),
    (["a", 1], Sequence[str], False),
    ([1, 2], tuple[int, int], True),
    ([1, 2, 3], tuple[int, int], False),
    ({"a": [0.1, 0.2]}, Mapping[str, tuple[float, float]], True),
    ({"0.5": 1.0}, Mapping[float, float], True),
    ({"half": 1.0}, Mapping[float, float], False),
    (len, Callable[[Any], int], True),
    (torch.zeros(1), torch.Tensor, True),
]


@pytest.mark.parametrize(("value", "hint", "right"), FITTING)
def test_hints(value: Any, hint: Any, right: bool) -> None:
    assert fits(value, hint) == right


def test_hints_in_words() -> None:
    assert described(bool | None) == "True or False or None"
    assert described(Sequence[str]) == "a list of texts"
    assert described(tuple[int, int]) == "(a whole number, a whole number)"
    assert described(Mapping[str, float]) == "a table {a text: a finite number}"
    assert described(Literal["soft", "hard"]) == "'soft' or 'hard'"


class Thing:
    @checked(infinite=("far",))
    def __init__(self, size: int = 1, *rest: str, far: float = 0.0, **others: Any) -> None:
        self.size, self.far = size, far

    @checked()
    def paint(self, *, seed: int = 0) -> int:
        return seed


def test_numbers_arrive_as_python_s() -> None:
    made = Thing(np.int64(3), far=np.float32(math.inf))
    assert type(made.size) is int and type(made.far) is float
    assert made.paint(seed=np.int64(5)) == 5  # type: ignore[arg-type]
    assert Thing.paint.__name__ == "paint"
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        made.paint(colour=1)  # type: ignore[call-arg]


def on(pipe: str = "sd15") -> Any:
    return zoo.PIPELINES[pipe].make()


def drawn(*editors: Any) -> None:
    pipe = on()
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the denoiser ran"))
    with control(pipe, *editors):
        pytest.fail("the context was entered")


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (partial(SEG, paper="false"), "SEG: paper='false'; give True or False"),
    (partial(PAG, sites=0.5), "PAG: sites=0.5; give a text or a function or a list of texts"),
    (partial(PAG, sites="self @1/0"), "PAG: '@1/0' is no resolution"),
    (partial(PAG, start="x"), "PAG: start='x'; give a finite number"),
    (partial(PAG, stop=1.5), "PAG: stop=1.5; give a fraction of the schedule, from 0 to 1"),
    (partial(FreeU, start=0.5, stop=0.2), "FreeU: start=0.5, stop=0.2; give a start before"),
    (partial(SAG, kernel=2.9), "SAG: kernel=2.9; give a whole number"),
    (partial(RegionalPrompts, "a cat", [HALF]), "RegionalPrompts: texts='a cat'; give a list"),
    (partial(BoxDiff, ["cat"], {"cat": HALF}), "BoxDiff: regions={'cat'"),
    (partial(BoxDiff, ["cat"], [HALF], threshold="abc"), "unexpected keyword argument"),
    (partial(OneWayFlow, [HALF], []), r"OneWayFlow: regions=\[.*; give a table \{a text: "),
    (partial(MasaCtrl, TWO, union=1), "MasaCtrl: union=1; give True or False"),
    (partial(MasaCtrl, TWO, threshold=math.nan), "MasaCtrl: threshold=nan; give"),
    (partial(PromptToPrompt, [*TWO, "a\ud800"]), "PromptToPrompt: prompts="),
    (partial(PromptToPrompt, TWO, paper=None), "PromptToPrompt: paper=None; give True or False"),
    (partial(ScaleU, [[math.nan]]), r"ScaleU: backbone=\[\[nan\]\]; give"),
    (partial(StyleAligned(TWO).run, on, seed="x"), "StyleAligned.run: seed='x'; give a whole"),
    (partial(StyleAligned(TWO).generators, -1), "StyleAligned.generators: seed=-1; give a whole"),
    (partial(MaskedSelfAttention, [HALF] * 70), "70 regions of a prompt; give at most 63"),
]


@pytest.mark.parametrize(("make", "says"), MISTAKES)
def test_mistakes(make: Callable[[], Any], says: str) -> None:
    with pytest.raises((InputError, TypeError), match=says):
        make()


def test_mistakes_on_a_pipeline() -> None:
    pipe, image = on(), Image.new("RGB", (16, 16))
    mistakes: list[tuple[Callable[[], Any], str]] = [
        (partial(control, pipe, rows="cond"), "control: rows='cond'; give a list of texts"),
        (partial(control, pipe, rows=["cond", "cond"]), "control: rows=.*each once"),
        (partial(control, pipe, strict="no"), "control: strict='no'; give True or False"),
        (partial(control, "sd15"), "target is a str, which holds no denoiser"),
        (partial(DDIMInversion, pipe, TWO[0], image), "give the image before its prompt"),
        (partial(DDIMInversion, pipe, image, TWO[0], steps=2.9), "steps=2.9; give a whole number"),
        (
            partial(DDIMInversion, pipe, image, TWO[0], refine=2**70),
            "refine=11805916",
        ),
        (partial(DDIMInversion, pipe, image, TWO[0], refine=-1), "refine=-1; give a whole number"),
        (partial(DDIMInversion, pipe, image, TWO[0], timestep="x"), "timestep='x'; give one of"),
        (partial(Imagic, pipe, image, TWO[0], alphas=[math.nan]), r"Imagic: alphas=\[nan\]"),
        (
            partial(Imagic, pipe, image, TWO[0], rank=10**6),
            "rank=1000000; give a whole number",
        ),
        (partial(Imagic, pipe, image, TWO[0], layers="("), r"layers='\('; give a regular"),
        (partial(Trajectory, pipe, TWO, guidance=math.inf), "Trajectory: guidance=inf; give"),
        (partial(Trajectory, pipe, TWO, generator=[torch.Generator()]), "1 generators for 2"),
        (partial(Trajectory, pipe, TWO, latents=torch.zeros(2, 3, 8, 8)), "Trajectory: latents="),
        (partial(hookctl.load_shapes, device="paper"), "load_shapes: device='paper'; give 'cpu'"),
        (partial(hookctl.load_shapes, dtype=torch.int8), "load_shapes: dtype=torch.int8; give"),
    ]
    for make, says in mistakes:
        with pytest.raises(InputError, match=says):
            make()


@pytest.mark.parametrize(
    "editor",
    [
        PAG(sites="cross"),
        SEG(sites="cross"),
        SAG(sites="cross"),
        MaskedSelfAttention([HALF], sites="cross"),
        RegionalPrompts(["a cat"], [HALF], sites="self"),
        OneWayFlow({"seed": HALF}, [("seed", "rest", 1.0)], sites="cross"),
    ],
    ids=lambda editor: editor.name,
)
def test_the_wrong_kind_of_site_is_told_before_the_denoiser_runs(editor: Any) -> None:
    with pytest.raises(InputError, match=f"{editor.name}: sites=.* holds .*; give sites where"):
        drawn(editor)


def test_what_a_user_s_function_of_sites_raises() -> None:
    with pytest.raises(SelectorError, match="fails for .*, by ZeroDivisionError"):
        drawn(PAG(sites=lambda site: 1 / 0 > 0))
