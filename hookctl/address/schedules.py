"""Prompts that change on the way: the syntax of A1111's web UI, which ComfyUI's nodes read too.

    [from:to:when]   `from` until that time, then `to`; either may be empty
    [to:when]        nothing until that time, then `to`
    [a|b|c]          one after the other, a new one at each step

A time with a point is a fraction of the steps, 0.4; without one a number of steps, 10. Parts nest.
Other brackets are text, and so are \\[ \\] \\: and \\|.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hookctl.errors import InputError

_NUMBER = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*")
_ESCAPED = re.compile(r"\\([\[\]:|])")
_TRIED = 1000  # steps by which a prompt is told to change or not


@dataclass(frozen=True)
class Switch:
    """`before` for a fraction of the steps (a float), or for a number of them (an int)."""

    before: Nodes
    after: Nodes
    when: float | int

    def at(self, step: int, steps: int) -> str:
        first = int(self.when * steps + 1e-9) if isinstance(self.when, float) else self.when
        return _text(self.before if step < first else self.after, step, steps)


@dataclass(frozen=True)
class Alternation:
    """One option after the other, from step to step."""

    options: tuple[Nodes, ...]

    def at(self, step: int, steps: int) -> str:
        return _text(self.options[step % len(self.options)], step, steps)


Nodes = tuple["str | Switch | Alternation", ...]


@dataclass(frozen=True)
class ScheduledPrompt:
    """A prompt of each step. written: as it was given."""

    written: str
    nodes: Nodes

    @classmethod
    def read(cls, text: str) -> ScheduledPrompt:
        """InputError for a schedule whose time is none."""
        return cls(text, _read(text, text))

    def at(self, step: int, steps: int) -> str:
        """The prompt of a step, from 0, of so many."""
        return _text(self.nodes, step, steps)

    @property
    def first(self) -> str:
        """The prompt that a run of many steps begins with."""
        return self.at(0, 10**9)

    @property
    def changes(self) -> bool:
        """Whether it is another one at any step."""
        return len(set(self.of_steps(_TRIED))) > 1

    @property
    def start(self) -> float:
        """The fraction of the schedule until which it is surely the first one."""
        return min(
            (one if isinstance(one, float) else 0.0 for one in _times(self.nodes)), default=1.0
        )

    def of_steps(self, steps: int) -> list[str]:
        """The prompts of all steps."""
        return [self.at(step, steps) for step in range(steps)]


def is_scheduled(text: str) -> bool:
    """Whether a text says anything in this syntax. InputError as of `ScheduledPrompt.read`."""
    return any(not isinstance(node, str) for node in _read(text, text))


def _text(nodes: Nodes, step: int, steps: int) -> str:
    return "".join(one if isinstance(one, str) else one.at(step, steps) for one in nodes)


def _times(nodes: Nodes) -> Iterator[float | int]:
    """When anything changes; an alternation from the first step on."""
    for node in nodes:
        if isinstance(node, Switch):
            yield node.when
            yield from _times((*node.before, *node.after))
        elif isinstance(node, Alternation):
            yield 0


def _read(text: str, whole: str) -> Nodes:
    found: list[str | Switch | Alternation] = []
    position = 0
    while (start := _next(text, "[", position)) is not None:
        stop = _closing(text, start)
        if stop is None:
            break
        found.append(_plain(text[position:start]))
        found += _bracket(text[start + 1 : stop], whole)
        position = stop + 1
    found.append(_plain(text[position:]))
    return _joined(found)


def _bracket(inside: str, whole: str) -> Nodes:
    """What brackets round a text mean."""
    options = _split(inside, "|")
    if len(options) > 1:
        return (Alternation(tuple(_read(one, whole) for one in options)),)
    *texts, last = _split(inside, ":")
    if not texts or (len(texts) == 1 and not _NUMBER.fullmatch(last)):
        return ("[", *_read(inside, whole), "]")
    said = f"prompt schedule [{inside}] of {whole!r}"
    if len(texts) > 2:
        raise InputError(f"{said}: give [from:to:when], or \\: for a colon that is text")
    number = _NUMBER.fullmatch(last)
    value = float(number[1]) if number else math.nan
    is_share = number is not None and "." in number[1]
    if not number or (is_share and value > 1):
        raise InputError(
            f"{said}: {last.strip()!r} is no time; give a fraction of the steps such as 0.4, or a "
            "number of steps such as 10"
        )
    before, after = (["", *texts])[-2:]
    when = value if is_share else int(number[1])
    return (Switch(_read(before, whole), _read(after, whole), when),)


def _split(text: str, separator: str) -> list[str]:
    """At separators that stand in no brackets or parentheses of their own."""
    parts, start = [], 0
    while (stop := _next(text, separator, start, outside=True)) is not None:
        parts.append(text[start:stop])
        start = stop + 1
    return [*parts, text[start:]]


def _closing(text: str, start: int) -> int | None:
    """Where the bracket that opens at `start` closes."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] in "[]":
            depth += 1 if text[i] == "[" else -1
            if not depth:
                return i
        i += 1
    return None


def _next(text: str, wanted: str, start: int, *, outside: bool = False) -> int | None:
    """Where a sign comes next that no backslash makes text."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        if text[i] == wanted and depth <= 0:
            return i
        if outside:
            depth += (text[i] in "[(") - (text[i] in "])")
        i += 1
    return None


def _plain(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


def _joined(nodes: Sequence[str | Switch | Alternation]) -> Nodes:
    """Without empty texts, and with neighbouring ones as one."""
    out: list[str | Switch | Alternation] = []
    for node in nodes:
        if isinstance(node, str) and out and isinstance(out[-1], str):
            out[-1] += node
        elif node != "":
            out.append(node)
    return tuple(out)
