"""Reference images of an edit model as places: `references[0]` wherever a word can stand."""

from __future__ import annotations

import re
from typing import Any

from hookctl.address.sites import Grid, ImageTokens
from hookctl.arguments.values import is_list, shown
from hookctl.errors import InputError

_NAME = re.compile(r"\s*references\[(\d+)\]\s*")


def reference_name(index: int) -> str:
    """How a reference is written: "references[0]" is the first one of the call."""
    return f"references[{index}]"


def reference_index(word: Any) -> int | None:
    """Which reference a word is, None for a word of the prompt."""
    match = _NAME.fullmatch(word) if isinstance(word, str) else None
    return int(match[1]) if match else None


def reference_indices(given: Any, argument: str) -> tuple[int, ...]:
    """References by number or by name, none twice; InputError that names the argument."""
    wanted = "numbers from 0, or names such as 'references[0]'"
    if not is_list(given):
        raise InputError(f"{argument}: {shown(given)} given; a list of {wanted} expected")
    found = []
    for one in given:
        index = reference_index(one) if isinstance(one, str) else one
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise InputError(f"{argument}: {shown(one)} given; {wanted} expected")
        found.append(index)
    return tuple(dict.fromkeys(found))


def check_references(
    who: str, indices: Any, images: ImageTokens | None, model: str
) -> tuple[Grid, ...]:
    """The grids of a run's references; InputError for one beyond those that were given.

    images: of the denoiser's sequence; model: its name.
    """
    grids = () if images is None else images.references
    for index in indices:
        if index >= len(grids):
            given = f"{len(grids)} reference image{'s' * (len(grids) != 1)}"
            most = f"; give references[0] to references[{len(grids) - 1}]"
            none = (
                "; call an edit pipeline (FluxKontextPipeline, Flux2KleinPipeline, "
                "QwenImageEditPlusPipeline) with image="
            )
            raise InputError(
                f"{who}: {reference_name(index)} is not among the images of this run, in which "
                f"{model} sees {given}{most if grids else none}"
            )
    return grids
