"""Checks of recipes' arguments. Every message says the argument, what was given and what would do:

    PAG: scale=-1; give a finite number of 0 or more

`name` is the argument as the message shows it, value what was given for it. Every check returns the
value in the form that recipes use, and raises InputError.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hookctl.address.pixels import readable
from hookctl.errors import InputError

T = TypeVar("T")

Colour = tuple[int, int, int]


def refusal(name: str, value: Any, wanted: str) -> InputError:
    """The error of an argument; wanted: what would do, as in "give <wanted>"."""
    shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return InputError(f"{name}={shown}; give {wanted}")


# -- numbers ---------------------------------------------------------------------------------------


def number(
    value: Any,
    name: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    also: Sequence[float] = (),
    wanted: str | None = None,
) -> float:
    """A finite number.

    low, high: the least and the greatest that will do; above, below: the bounds that will not.
    also: infinities that will do. wanted: what to ask for, by default the bounds.
    """
    if _is_number(value):
        found = float(value)
        inside = (
            math.isfinite(found)
            and (low is None or found >= low)
            and (above is None or found > above)
            and (high is None or found <= high)
            and (below is None or found < below)
        )
        if inside or found in also:
            return found
    asked = _bounds(low, above, high, below) + "".join(f" or {other}" for other in also)
    raise refusal(name, value, wanted or asked)


def share(value: Any, name: str) -> float:
    """A number from 0 to 1."""
    return number(value, name, low=0, high=1)


def whole(value: Any, name: str, least: int = 0) -> int:
    """A whole number of at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise refusal(name, value, f"a whole number of {least} or more")
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _bounds(low: float | None, above: float | None, high: float | None, below: float | None) -> str:
    if low is not None and (high is not None or below is not None):
        return f"a number from {low:g} to " + (f"below {below:g}" if high is None else f"{high:g}")
    start = "" if above is None else f" above {above:g}"
    if high is not None or below is not None:
        stop = f"below {below:g}" if high is None else f"at most {high:g}"
        return f"a number{start}{',' if start else ''} {stop}"
    return f"a finite number{start}" if low is None else f"a finite number of {low:g} or more"


# -- one of several, several of one ----------------------------------------------------------------


def one_of(value: Any, name: str, choices: Sequence[T]) -> T:
    """One of some values."""
    if value not in choices:
        raise refusal(name, value, f"one of {', '.join(map(str, choices))}")
    found: T = value
    return found


def pair(value: Any, name: str, one: Callable[[Any, str], T], wanted: str) -> tuple[T, T]:
    """Two values, or one that stands for both; one: checks each of them."""
    items = tuple(value) if isinstance(value, tuple | list) else (value, value)
    try:
        first, second = (one(item, name) for item in items)
    except ValueError:  # of either, or of their number
        raise refusal(name, value, wanted) from None
    return first, second


def for_each(value: Any, name: str, count: int, of: str, *, is_one: bool) -> list[Any]:
    """A list with one entry for each of `count` things, such as "edits".

    is_one: the value is an entry, which then stands for all.
    """
    entries = [value] * count if is_one else list(value)
    if len(entries) != count:
        raise InputError(
            f"{name}={value!r} has {len(entries)} entries for {count} {of}; give one for all, or "
            "a list with one for each"
        )
    return entries


# -- texts -----------------------------------------------------------------------------------------


def text(value: Any, name: str, wanted: str = "a text") -> str:
    """A text, not empty."""
    if not isinstance(value, str) or not value:
        raise refusal(name, value, wanted)
    return value


def text_or_embeddings(value: Any, name: str) -> str | Tensor:
    """A text, or its embeddings [tokens, channels]."""
    if isinstance(value, str) or (isinstance(value, Tensor) and value.dim() == 2):
        return value
    raise refusal(name, value, "a text, or embeddings [tokens, channels]")


def words_for_each(value: Any, name: str, prompts: int) -> list[tuple[str, ...]]:
    """The words of each prompt: one for all prompts, or a list with one entry for each.

    An entry is a word, a list of words, or None for no word.
    """
    is_one = not isinstance(value, list | tuple)
    found = []
    for entry in for_each(value, name, prompts, "prompts", is_one=is_one):
        words = [entry] if isinstance(entry, str) else entry or ()
        if not isinstance(words, Sequence) or any(not isinstance(word, str) for word in words):
            raise InputError(f"{name}={value!r}; {entry!r} is neither a word, words nor None")
        found.append(tuple(words))
    return found


def gains_for_each(value: Any, name: str, edits: int) -> list[dict[str, float]]:
    """The gains of each edit's words: {word: gain} for all edits, or a list with one for each.

    An entry of the list may be None, for no gains.
    """
    is_one = value is None or isinstance(value, Mapping)
    found = []
    for entry in for_each(value, name, edits, "edits", is_one=is_one):
        if entry is not None and not isinstance(entry, Mapping):
            raise refusal(name, value, "{word: gain}, or a list of them")
        gains = (entry or {}).items()
        found.append({word: number(gain, f"{name}[{word!r}]") for word, gain in gains})
    return found


# -- images ----------------------------------------------------------------------------------------


def images_and_prompts(image: Any, prompt: Any, name: str) -> tuple[list[Any], list[str]]:
    """Images and as many prompts, of one prompt and its image or of a list of each."""
    single = isinstance(prompt, str)
    prompts, images = ([prompt], [image]) if single else (list(prompt), list(image))
    if len(images) != len(prompts) or not prompts:
        raise InputError(
            f"{name}: {len(images)} images and {len(prompts)} prompts; give as many of both"
        )
    return images, prompts


def opened(image: Any, name: str) -> Any:
    """An image as it is, or the one in the file at a path, in mode RGB."""
    if not isinstance(image, str | Path):
        return image
    return readable(image, name)


def colours(value: Any, name: str) -> list[Colour]:
    """One colour or several, each (red, green, blue) from 0 to 255, as a list."""
    several = [value] if value and isinstance(value[0], int) else list(value)
    for colour in several:
        if len(colour) != 3 or any(not isinstance(c, int) or not 0 <= c <= 255 for c in colour):
            raise refusal(name, value, "(red, green, blue), each from 0 to 255")
    return [(int(r), int(g), int(b)) for r, g, b in several]
