"""Checks of one argument at a time. Messages say the argument, what was given and what would do:

    PAG: scale=-1; give a finite number of 0 or more

`name` is the argument as the message shows it, value what was given for it. Every check returns the
value in the form in which it is used, and raises InputError.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from hookctl.bounds import COUNT, SEED
from hookctl.errors import InputError

T = TypeVar("T")

SHOWN = 200  # letters of a value in a message


def refusal(name: str, value: Any, wanted: str) -> InputError:
    """The error of an argument; wanted: what would do, as in "give <wanted>"."""
    return InputError(f"{name}={shown(value)}; give {wanted}")


def shown(value: Any) -> str:
    """A value as an error shows it, in one line."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Image.Image):
        return f"an image of {value.width} x {value.height} px"
    if getattr(value, "shape", None) is not None and hasattr(value, "dtype"):
        return f"an array {value.shape}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of thousands of digits, or an object that can't be shown
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


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
    if is_number(value):
        found = as_float(value)
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


def whole(value: Any, name: str, least: int = 0, most: int = COUNT) -> int:
    """A whole number from `least` to `most`."""
    if not is_whole(value) or not least <= value <= most:
        bounds = f"from {least} to {most}"
        if most == COUNT and not (is_whole(value) and value > most):
            bounds = f"of {least} or more"  # nobody meets the other bound by mistake
        raise refusal(name, value, f"a whole number {bounds}")
    return int(value)


def seed(value: Any, name: str) -> int:
    """A seed of random numbers."""
    if not is_whole(value) or not 0 <= value <= SEED:
        raise refusal(name, value, "a whole number of 0 or more, below 2**63")
    return int(value)


def flag(value: Any, name: str) -> bool:
    """A truth value; nothing else is read as one."""
    if not isinstance(value, bool):
        raise refusal(name, value, "True or False")
    return value


def device(value: Any, name: str) -> None:
    """A device that torch finds here."""
    try:
        held = not torch.empty(1, device=value).is_meta
        reason = "it holds no values"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        held, reason = False, shown(str(error).splitlines()[0])
    if not held:
        raise refusal(name, str(value), f"'cpu', or another that torch finds here ({reason})")


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def as_float(value: Any) -> float:
    """A number as a float; infinity if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


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
    if not any(type(value) is type(choice) and value == choice for choice in choices):
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
    if not is_one and not is_list(value):
        raise refusal(name, value, f"one for all {of}, or a list with one for each")
    entries = [value] * count if is_one else list(value)
    if len(entries) != count:
        raise InputError(
            f"{name}={shown(value)} has {len(entries)} entries for {count} {of}; give one for all, "
            "or a list with one for each"
        )
    return entries


# -- texts -----------------------------------------------------------------------------------------


def text(value: Any, name: str, wanted: str = "a text") -> str:
    """A text, not empty."""
    if not is_text(value) or not value.strip():
        raise refusal(name, value, wanted)
    return value


def text_or_embeddings(value: Any, name: str) -> str | Tensor:
    """A text, or its embeddings [tokens, channels]."""
    if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point():
        if not bool(value.isfinite().all()):
            raise InputError(f"{name}={shown(value)} holds NaN or infinity; give finite embeddings")
        return value
    if is_text(value):
        checked_text: str = value
        return checked_text
    raise refusal(name, value, "a text, or embeddings [tokens, channels]")


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written, which one with half a character can't."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_list(value: Any) -> bool:
    """Whether a value is a list of things, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def words_for_each(value: Any, name: str, prompts: int) -> list[tuple[str, ...]]:
    """The words of each prompt: one for all prompts, or a list with one entry for each.

    An entry is a word, a list of words, or None for no word.
    """
    found = []
    for entry in for_each(value, name, prompts, "prompts", is_one=not is_list(value)):
        words = [entry] if isinstance(entry, str) else () if entry is None else entry
        if not is_list(words) or any(not is_text(word) for word in words):
            raise InputError(
                f"{name}={shown(value)}; {shown(entry)} is neither a word, words nor None"
            )
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
        if not all(is_text(word) for word, _ in gains):
            raise refusal(name, value, "{word: gain}, with texts as words")
        found.append({word: number(gain, f"{name}[{word!r}]") for word, gain in gains})
    return found
