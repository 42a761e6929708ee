"""What an evaluation asks of torch, recorded once and played again on other tensors.

Between the tensors of a call and its output stand some dozens of torch calls, and many times as
many lines of Python that choose them: on a fast GPU the Python is what one waits for. A tape is the
torch calls alone. They are those that were recorded, in their order, so that the numbers are the
same to the last bit; the choices made on the way hold for tensors of the same form.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

# Answered by a tensor's form alone.
_OF_FORM = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "requires_grad", "grad_fn", "is_leaf")),
    *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.element_size),
    *(Tensor.__len__, Tensor.is_floating_point, Tensor.is_inference, Tensor.is_contiguous),
}

Values = list[Any]
Shortcut = Callable[[Any, Sequence[Any]], Callable[..., Any]]


class _Step(NamedTuple):
    """function(*of(values)) is put in place `to`; what is `over` is not needed after it."""

    function: Callable[..., Any]
    of: Callable[[Values], tuple[Any, ...]]
    to: int
    over: tuple[int, ...]


class Tape:
    """The torch calls between some tensors and what was made of them."""

    def __init__(self, steps: Sequence[_Step], rest: Values, results: Sequence[int]) -> None:
        self._steps, self._rest, self._results = tuple(steps), rest, tuple(results)

    def play(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The results for other tensors of the same form."""
        values = [*given, *self._rest]
        for function, of, to, over in self._steps:
            values[to] = function(*of(values))
            for place in over:
                values[place] = None
        return [values[place] for place in self._results]


class Recorder(TorchFunctionMode):
    """Notes every torch call made inside.

    shortcut: gives, for a function and its arguments, what may be called in its place; refused: why
    no tape can be made: a call answered by a tensor's values, say.
    """

    def __init__(self, given: Sequence[Tensor], shortcut: Shortcut | None = None) -> None:
        super().__init__()
        self._shortcut = shortcut
        self.refused: str | None = None
        self._count = len(given)
        # By their places: constants, and None for what is made. Nothing is kept alive for us.
        self._rest: Values = [None] * self._count
        self._constant: set[int] = set()
        self._places: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        for place, x in enumerate(given):
            self._places[id(x)] = weakref.ref(x), place
        self._steps: list[tuple[Callable[..., Any], tuple[int, ...], int]] = []
        self._lasting: set[int] = set()  # made by steps that write to what is there
        self._paused = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused or func in _OF_FORM:
            return out
        tensors = isinstance(out, tuple | list) and all(isinstance(x, Tensor) for x in out)
        if isinstance(out, Tensor) or tensors or func is Tensor.__setitem__:
            self._note(func, args, kwargs or {}, out)
        elif _holds((*args, *(kwargs or {}).values())):
            self.refused = f"{getattr(func, '__name__', func)} gives {type(out).__name__}"
        return out

    def tape(self, results: Sequence[Tensor]) -> Tape | None:
        """What was recorded; None if it can't be played."""
        if self.refused is not None:
            return None
        places = [self._place(x) for x in results]
        steps = self._needed(places)
        over = self._over(steps, places)
        played = [
            _Step(function, _picking(of), to, over[i]) for i, (function, of, to) in enumerate(steps)
        ]
        return Tape(played, self._rest[self._count :], places)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        of = [self._place(x) for x in (*args, *kwargs.values())]
        function = _named(func, tuple(kwargs)) if kwargs else func
        if self._shortcut is not None and not kwargs:
            function = self._shortcut(func, args)
        to = self._new(out)
        if out is None or "out" in kwargs or any(out is x for x in args):
            self._lasting.add(to)
        self._steps.append((function, tuple(of), to))
        if isinstance(out, tuple | list):
            for i, x in enumerate(out):
                self._steps.append((itemgetter(i), (to,), self._new(x)))

    def _new(self, value: Any) -> int:
        """A place for what a step makes."""
        place = len(self._rest)
        self._rest.append(None)
        if isinstance(value, Tensor):
            self._places[id(value)] = weakref.ref(value), place
        return place

    def _place(self, value: Any) -> int:
        """Where a value stands; what was not made here is a constant."""
        if isinstance(value, tuple | list) and any(_holds(x) for x in value):
            parts = tuple(self._place(x) for x in value)
            to = self._new(value)
            self._steps.append((_tuple if isinstance(value, tuple) else _list, parts, to))
            return to
        found = self._places.get(id(value))
        if found is not None and found[0]() is value:
            return found[1]
        place = len(self._rest)
        self._rest.append(value)
        self._constant.add(place)
        return place

    def _needed(self, results: Sequence[int]) -> list[tuple[Any, tuple[int, ...], int]]:
        """The steps without those that make what nobody uses."""
        used, kept = self._lasting.union(results), []
        for step in reversed(self._steps):
            _, of, to = step
            if to in used:
                used.update(of)
                kept.append(step)
        return kept[::-1]

    def _over(self, steps: Sequence[Any], results: Sequence[int]) -> list[tuple[int, ...]]:
        """What each step is the last to need, so that memory is let go as it was at first."""
        last: dict[int, int] = {}
        for i, (_, of, to) in enumerate(steps):
            last |= dict.fromkeys((*of, to), i)
        over: list[list[int]] = [[] for _ in steps]
        for place, i in last.items():
            made = place >= self._count and place not in self._constant
            if made and place not in results:
                over[i].append(place)
        return [tuple(places) for places in over]


def _holds(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds(x) for x in value)
    return isinstance(value, Tensor)


def _tuple(*parts: Any) -> tuple[Any, ...]:
    return parts


def _list(*parts: Any) -> list[Any]:
    return list(parts)


def _named(func: Any, names: tuple[str, ...]) -> Callable[..., Any]:
    """A function whose last arguments are given by name."""
    count = len(names)

    def call(*args: Any) -> Any:
        return func(*args[:-count], **dict(zip(names, args[-count:], strict=True)))

    return call


def _picking(places: tuple[int, ...]) -> Callable[[Values], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


@contextmanager
def unrecorded() -> Iterator[None]:
    """What is made inside is a constant to whoever records, and is not made again."""
    recorder = _get_current_function_mode()
    if not isinstance(recorder, Recorder) or recorder._paused:
        yield
        return
    recorder._paused = True
    try:
        yield
    finally:
        recorder._paused = False


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether results are equal to the last bit."""
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


__all__ = ["Recorder", "Tape", "same", "unrecorded"]
