"""Guidance by two calls of a step: what an editor knows of the step must not change between them.

Where the negative prompt is the prompt itself, both calls predict the same and the scale of
guidance means nothing, as it does where both branches are rows of one call.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hookctl import Editor, control
from hookctl.recipes import ConsiStory, MasaCtrl, ReferenceOnly
from tests import zoo
from tests.recipes.images import image
from tests.recipes.runs import relative

TEXTS = ["a red cat", "a blue cat"]
SITES = "self, joint"
EDITORS: dict[str, Callable[[], Editor]] = {
    "ConsiStory": lambda: ConsiStory(TEXTS, "cat", sites=SITES),
    "MasaCtrl": lambda: MasaCtrl(TEXTS, start=0.0, sites=SITES, words="cat"),
    "ReferenceOnly": lambda: ReferenceOnly(TEXTS, image(), fidelity=0.0),
}


def drawn(name: str, editor: Editor | None, guidance: float) -> Tensor:
    case = zoo.PIPELINES[name]
    same = [torch.Generator().manual_seed(0) for _ in TEXTS]
    call = {"steps": 4, "guidance": guidance, "generator": same}
    with control(pipe := case.make(), *([] if editor is None else [editor])):
        return case.run(pipe, TEXTS, TEXTS, **call)


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("family", ["sd3", "flux"])  # by one call, and by two
def test_guidance_by_the_prompt_itself_is_none(family: str, name: str) -> None:
    low, high = (drawn(family, EDITORS[name](), guidance) for guidance in (2.0, 6.0))
    assert relative(low, high) < 1e-5
    assert relative(low, drawn(family, None, 2.0)) > 1e-4
