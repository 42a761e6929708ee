"""The arguments of `Maps` that are places: positions of the text, patches, what is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookctl.address.references import reference_index, reference_name
from hookctl.errors import InputError
from hookctl.maps.records import IMAGE


def positions(given: Sequence[int]) -> tuple[int, ...]:
    whole = isinstance(given, Sequence | range) and not isinstance(given, str)
    if not whole or any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in given):
        raise InputError(f"Maps: tokens={given!r}; give positions of the text, such as [0, 5]")
    return tuple(dict.fromkeys(given))


def patches(given: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    wanted = "places (y, x) in fractions of the image, such as [(0.5, 0.25)]"
    if not isinstance(given, list | tuple) or not all(_is_place(place) for place in given):
        raise InputError(f"Maps: patches={given!r}; give {wanted}")
    return tuple(dict.fromkeys((float(y), float(x)) for y, x in given))


def looked_at(given: str | None, references: Sequence[int]) -> str | None:
    """What words, tokens and patches look at: None, "image" or a reference.

    references: those whose maps are read beside, which look at nothing themselves.
    """
    if given is None:
        return None
    index = reference_index(given)
    if index is None and not (isinstance(given, str) and given == IMAGE):
        raise InputError(f"Maps: to={given!r}; give 'image', a reference such as 'references[0]'")
    if references:
        raise InputError(
            f"Maps: to={given!r} with {reference_name(references[0])!r} among the words; what a "
            "reference looks at is not read: give words, tokens or patches, or another Maps"
        )
    return IMAGE if index is None else reference_name(index)


def _is_place(place: Any) -> bool:
    return (
        isinstance(place, list | tuple)
        and len(place) == 2
        and all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1 for x in place
        )
    )
