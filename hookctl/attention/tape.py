"""What an evaluation asks of torch, recorded once and played again on other tensors.

Between the tensors of a call and its output stand some dozens of torch calls, and many times as
many lines of Python that choose them: on a fast GPU the Python is what one waits for. A tape is the
torch calls alone. They are those that were recorded, in their order, so that the numbers are the
same to the last bit; the choices made on the way hold for tensors of the same form.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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

Shortcut = Callable[[Any, Sequence[Any]], Callable[..., Any]]


class _Step(NamedTuple):
    """Put function(*of), the last of them given by `names`, in place `to`."""

    function: Callable[..., Any]
    of: tuple[int, ...]
    names: tuple[str, ...]
    to: int


class Tape:
    """The torch calls between some tensors and what was made of them.

    steps: in their order; given: how many tensors there are at first, in the first places;
    constants: what stands in other places from the beginning; results: the places that are asked
    for.
    """

    def __init__(
        self,
        steps: Sequence[_Step],
        given: int,
        constants: Mapping[int, Any],
        results: Sequence[int],
    ) -> None:
        # As a function of Python: to look up steps and places takes as long as small calls do.
        known: dict[str, Any] = {f"c{place}": value for place, value in constants.items()}
        name = {place: f"c{place}" for place in constants}
        name |= {place: f"v{place}" for place in [*range(given), *(step.to for step in steps)]}
        lines = [f"[{', '.join(name[place] for place in range(given))}] = given"]
        for i, (step, over) in enumerate(zip(steps, _over(steps, results), strict=True)):
            known[f"f{i}"] = step.function
            by_place = len(step.of) - len(step.names)
            of = [name[place] for place in step.of]
            of[by_place:] = [f"{n}={x}" for n, x in zip(step.names, of[by_place:], strict=True)]
            lines.append(f"{name[step.to]} = f{i}({', '.join(of)})")
            # Memory is let go as it was at first.
            lines += [f"del {name[place]}" for place in over]
        lines.append(f"return [{', '.join(name[place] for place in results)}]")
        exec("\n    ".join(["def play(given):", *lines]), known)
        self._play: Callable[[Sequence[Tensor]], list[Tensor]] = known["play"]

    def play(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The results for other tensors of the same form."""
        return self._play(given)


def _over(steps: Sequence[_Step], results: Sequence[int]) -> list[list[int]]:
    """What was made, by the step that is the last to need it."""
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        last |= dict.fromkeys((*step.of, step.to), i)
    over: list[list[int]] = [[] for _ in steps]
    for place in {step.to for step in steps}.difference(results):
        over[last[place]].append(place)
    return over


class Recorder(TorchFunctionMode):
    """Notes every torch call made inside.

    shortcut: gives, for a function and its arguments, what may be called in its place; refused: why
    no tape can be made: a call answered by a tensor's values, say.
    """

    def __init__(self, given: Sequence[Tensor], shortcut: Shortcut | None = None) -> None:
        super().__init__()
        self._shortcut = shortcut
        self.refused: str | None = None
        self._given = len(given)
        self._next = len(given)  # the first free place
        self._constants: dict[int, Any] = {}
        # The places of tensors. Nothing is kept alive for us.
        self._places: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        for place, x in enumerate(given):
            self._places[id(x)] = weakref.ref(x), place
        self._steps: list[_Step] = []
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
        used = {place for step in steps for place in step.of}.union(places)
        constants = {place: x for place, x in self._constants.items() if place in used}
        return Tape(steps, self._given, constants, places)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        of = tuple([self._place(x) for x in (*args, *kwargs.values())])
        if self._shortcut is not None and not kwargs:
            func = self._shortcut(func, args)
        to = self._new(out)
        if out is None or "out" in kwargs or any(out is x for x in args):
            self._lasting.add(to)
        self._steps.append(_Step(func, of, tuple(kwargs), to))
        if isinstance(out, tuple | list):
            for i, x in enumerate(out):
                self._steps.append(_Step(itemgetter(i), (to,), (), self._new(x)))

    def _new(self, value: Any = None) -> int:
        """A place for what a step makes, or for a constant."""
        place = self._next
        self._next += 1
        if isinstance(value, Tensor):
            self._places[id(value)] = weakref.ref(value), place
        return place

    def _place(self, value: Any) -> int:
        """Where a value stands; what was not made here is a constant."""
        if isinstance(value, tuple | list) and any(_holds(x) for x in value):
            parts = tuple([self._place(x) for x in value])
            to = self._new()
            self._steps.append(_Step(_tuple if isinstance(value, tuple) else _list, parts, (), to))
            return to
        found = self._places.get(id(value))
        if found is not None and found[0]() is value:
            return found[1]
        place = self._new()
        self._constants[place] = value
        return place

    def _needed(self, results: Sequence[int]) -> list[_Step]:
        """The steps without those that make what nobody uses."""
        used, kept = self._lasting.union(results), []
        for step in reversed(self._steps):
            if step.to in used:
                used.update(step.of)
                kept.append(step)
        return kept[::-1]


def _holds(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds(x) for x in value)
    return isinstance(value, Tensor)


def _tuple(*parts: Any) -> tuple[Any, ...]:
    return parts


def _list(*parts: Any) -> list[Any]:
    return list(parts)


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
