"""The recipes that a stack may name, by what they are for, and the measures of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hookctl

if TYPE_CHECKING:
    from hookctl.batch.filters.drawn import Drawn
    from hookctl.batch.filters.specs import Measure
    from hookctl.editor import Editor


def editors_by_name() -> dict[str, type[Editor]]:
    """Every editor that a stack may name: the recipes, Maps and References."""
    from hookctl import recipes

    known = [getattr(recipes, name) for name in recipes.__all__]
    found = {c.__name__: c for c in known if isinstance(c, type) and issubclass(c, hookctl.Editor)}
    return found | {"Maps": hookctl.Maps, "References": hookctl.References}


def inversions_by_name() -> dict[str, type[Any]]:
    """Every recipe that a stack may invert its image by."""
    from hookctl import recipes
    from hookctl.recipes.common.real_images.inversion import Inversion

    known = [getattr(recipes, name) for name in recipes.__all__]
    return {c.__name__: c for c in known if isinstance(c, type) and issubclass(c, Inversion)}


def programs_by_name() -> dict[str, type[Any]]:
    """Every recipe that draws after an image by a loop of its own."""
    from hookctl import recipes
    from hookctl.recipes import CyclicOneWay, Imagic
    from hookctl.recipes.common.real_images.flow import FlowProgram

    known = [getattr(recipes, name) for name in recipes.__all__]
    programs = (CyclicOneWay, FlowProgram, Imagic)
    return {c.__name__: c for c in known if isinstance(c, type) and issubclass(c, programs)}


def measures_by_name() -> dict[str, Measure]:
    """What a batch may filter by besides its own measures."""
    return {"shapes": shapes}


def shapes(drawn: Drawn) -> bool:
    """Whether the detector of the embedded pipeline's world sees in both images what their prompts
    say, and the edited objects where the source has them."""
    from hookctl.demos import judges

    pair = judges.Drawn(drawn.prompts, drawn.source, drawn.images)
    return judges.as_said(drawn.source, drawn.prompts[0]) and judges.edited_in_place(pair)
