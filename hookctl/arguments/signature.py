"""All arguments of a call at once, before any of its work: by their type hints and names.

    class PAG(Editor):
        @checked()
        def __init__(self, scale: float = 3.0, *, paper: bool = False) -> None: ...

`PAG(paper="false")` is an InputError: "PAG: paper='false'; give True or False". A hint says what
kind of value will do; a name that means the same wherever it stands (a seed, sites, a fraction of
the schedule) says more. Bounds of its own are checked by the function itself (`values`).
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from hookctl.address.sites import matcher
from hookctl.arguments import values
from hookctl.arguments.images import check_order
from hookctl.arguments.values import as_float, is_list, is_number, is_text, is_whole, refusal
from hookctl.bounds import IMAGES, REFINEMENTS, SIDE, STEPS
from hookctl.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_NOTHING = type(None)


def checked(*, infinite: Collection[str] = (), own: Collection[str] = ()) -> Callable[[F], F]:
    """A function, method or `__init__` that checks its arguments before it does anything.

    infinite: the parameters that may be infinite; own: those that the function checks in words of
    its own. What is left out keeps its default, unchecked.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checking(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:  # too many, too few: the call says so
                return function(*args, **kwargs)
            given = bound.arguments
            _check(function, signature, given, infinite, own)
            given.update({name: _plain(value) for name, value in given.items()})
            return function(*bound.args, **bound.kwargs)

        return cast(F, checking)

    return decorate


def _check(
    function: Callable[..., Any],
    signature: inspect.Signature,
    given: Mapping[str, Any],
    infinite: Collection[str],
    own: Collection[str],
) -> None:
    owner, hints = _label(function, given), _hints(function)
    check_order(given.get("image"), given.get("prompt"), owner)
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if name == "self" or name in own or kind is inspect.Parameter.VAR_KEYWORD:
            continue
        several = kind is inspect.Parameter.VAR_POSITIONAL
        for i, one in enumerate(value if several else (value,)):
            label = f"{owner}: {name}[{i}]" if several else f"{owner}: {name}"
            _check_one(one, hints.get(name, Any), name, label, name in infinite)
    if {"start", "stop"} <= signature.parameters.keys():
        _check_window(owner, *(_value(signature, given, name) for name in ("start", "stop")))


def _check_one(value: Any, hint: Any, name: str, label: str, infinite: bool) -> None:
    if not fits(value, hint, infinite=infinite):
        raise refusal(label, value, described(hint))
    by_name = _BY_NAME.get(name)
    several = isinstance(value, collections.abc.Iterable) and not isinstance(value, str)
    if by_name is not None and value is not None and (name == "sites" or not several):
        try:
            by_name(value, label)
        except InputError as error:
            if str(error).startswith(label):
                raise
            raise type(error)(f"{label.rpartition(': ')[0]}: {error}") from None


def _plain(value: Any) -> Any:
    """A number of NumPy's as one of Python's, which torch demands in places."""
    if is_whole(value) and type(value) is not int:
        return int(value)
    return float(value) if is_number(value) and type(value) not in (int, float) else value


def _value(signature: inspect.Signature, given: Mapping[str, Any], name: str) -> Any:
    return given.get(name, signature.parameters[name].default)


def _check_window(owner: str, start: Any, stop: Any) -> None:
    if is_number(start) and is_number(stop) and start > stop:
        raise InputError(f"{owner}: start={start}, stop={stop}; give a start before the stop")


def _label(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """What messages call the function: a class, a method of it, or a function."""
    if "self" not in given:
        return function.__name__
    owner, name = type(given["self"]).__name__, function.__name__
    return owner if name == "__init__" else f"{owner}.{name}"


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except NameError:  # a name that is imported for types only: nothing is known, nothing refused
        return {}


# -- names that mean the same wherever they stand --------------------------------------------------


def _fraction(value: Any, label: str) -> None:
    values.number(value, label, low=0, high=1, wanted="a fraction of the schedule, from 0 to 1")


def _sites(value: Any, label: str) -> None:
    matcher(value)


_BY_NAME: dict[str, Callable[[Any, str], object]] = {
    "seed": values.seed,
    "device": values.device,
    "sites": _sites,
    "start": _fraction,
    "stop": _fraction,
    "steps": functools.partial(values.whole, least=1, most=STEPS),
    "refine": functools.partial(values.whole, most=REFINEMENTS),
    "images": functools.partial(values.whole, least=1, most=IMAGES),
    "noises": functools.partial(values.whole, least=1, most=IMAGES),
    "height": functools.partial(values.whole, least=1, most=SIDE),
    "width": functools.partial(values.whole, least=1, most=SIDE),
    "output_type": functools.partial(values.one_of, choices=OUTPUT_TYPES),
}


# -- hints -----------------------------------------------------------------------------------------


def fits(value: Any, hint: Any, *, infinite: bool = False) -> bool:
    """Whether a value is of the kind that a type hint says. Numbers are finite, unless `infinite`.

    An int stands for a float, a list for a tuple, and the text of a number for it as a key. What
    can't be looked at from outside (calls of a function, members of a protocol) is believed.
    """
    origin, of = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar | str):
        return True
    if hint is None or hint is _NOTHING:
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, one, infinite=infinite) for one in of)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in of)
    if hint in _SCALARS:
        return _SCALARS[hint](value, infinite)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if kind is tuple:
        return is_list(value) and _fits_tuple(value, of, infinite)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and _fits_mapping(value, of, infinite)
    if kind in (collections.abc.Iterable, collections.abc.Collection):
        return isinstance(value, kind) and not isinstance(value, str | bytes)
    if kind in _LISTS:
        return is_list(value) and all(fits(item, of[0], infinite=infinite) for item in value if of)
    if kind is collections.abc.Callable:
        return callable(value)
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol
        return True


def _is_float(value: Any, infinite: bool) -> bool:
    if not is_number(value):
        return False
    found = as_float(value)
    return math.isfinite(found) or (infinite and not math.isnan(found))


_SCALARS: dict[Any, Callable[[Any, bool], bool]] = {
    bool: lambda value, infinite: isinstance(value, bool),
    int: lambda value, infinite: is_whole(value) and abs(value) < 2**63,
    float: _is_float,
    str: lambda value, infinite: is_text(value),
}
_LISTS = (list, collections.abc.Sequence)


def _fits_tuple(value: Any, of: tuple[Any, ...], infinite: bool) -> bool:
    if len(of) == 2 and of[1] is Ellipsis:
        return all(fits(item, of[0], infinite=infinite) for item in value)
    pairs = zip(value, of, strict=False)
    return len(value) == len(of) and all(fits(a, b, infinite=infinite) for a, b in pairs)


def _fits_mapping(value: Mapping[Any, Any], of: tuple[Any, ...], infinite: bool) -> bool:
    if not of:
        return True
    keys = all(fits(key, of[0]) or (of[0] is not str and _is_numeral(key)) for key in value)
    return keys and all(fits(item, of[1], infinite=infinite) for item in value.values())


def _is_numeral(key: Any) -> bool:
    """Tables of a file have texts for keys."""
    try:
        return isinstance(key, str) and math.isfinite(float(key))
    except ValueError:
        return False


_NAMES: dict[Any, str] = {
    Any: "anything",
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    None: "None",
    _NOTHING: "None",
}


_PLURALS = {
    "a text": "texts",
    "a whole number": "whole numbers",
    "a finite number": "finite numbers",
    "a Tensor": "tensors",
}


def described(hint: Any) -> str:
    """A hint in words, as in "give <words>"."""
    return " or ".join(dict.fromkeys(_phrases(hint)))


def _phrases(hint: Any) -> Iterator[str]:
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for one in of:
            yield from _phrases(one)
    elif origin is Literal:
        yield from map(repr, of)
    elif hint in _NAMES:
        yield _NAMES[hint]
    elif (origin or hint) is tuple and of and of[-1] is not Ellipsis:
        yield f"({', '.join(map(described, of))})"
    elif (origin or hint) is collections.abc.Callable:
        yield "a function"
    elif isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        yield f"a table {{{described(of[0])}: {described(of[1])}}}" if of else "a table"
    elif (origin or hint) in (*_LISTS, tuple, collections.abc.Iterable, collections.abc.Collection):
        of_one = described(of[0]) if of else ""
        yield f"a list of {_PLURALS.get(of_one, f'({of_one})')}" if of else "a list"
    else:
        name = getattr(origin or hint, "__name__", str(hint))
        yield f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
