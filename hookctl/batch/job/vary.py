"""Settings that differ from draw to draw: sampled, or from the columns of a pair.

    [vary.PromptToPrompt]
    self_replace = { uniform = [0.1, 0.9] }                     # a number of this range
    cross_replace = { window = [[0.0, 0.1], [0.6, 1.0]] }       # a start and a stop of these
    mode = { choice = ["replace", "refine"] }
    blend = { columns = ["word", "edited_word"] }               # what the pair says

    [vary.run]
    guidance = { choice = [3.0, 5.0, 7.5] }
    steps = { integer = [20, 40] }

What is sampled hangs on the draw's own numbers alone: no state, no order, the same everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hookctl.errors import InputError
from hookctl.preset.check import near, shown

DIGITS = 4  # of a number that is sampled: what a file says is what was used
KINDS = {
    "uniform": "[least, most], two numbers",
    "integer": "[least, most], two whole numbers",
    "window": "[[least, most], [least, most]], the ranges of a start and of a stop",
    "choice": "a list of values",
    "column": "a column of the pairs",
    "columns": "a list of columns of the pairs",
}


@dataclass(frozen=True)
class Varied:
    """How one setting is made; kind: a key of KINDS, value: what stands there."""

    kind: str
    value: Any

    def columns(self) -> list[str]:
        """The columns of a pair that it reads."""
        return {"column": [self.value], "columns": self.value}.get(self.kind, [])

    def extremes(self) -> list[Any]:
        """Values that have to be right if all are; none of what the pairs say."""
        if self.kind == "window":
            return [[float(a), float(b)] for a in self.value[0] for b in self.value[1]]
        return [] if self.columns() else list(self.value)

    def of(self, text: str, columns: Mapping[str, Any]) -> Any:
        """The value for a draw; text: what tells this draw and setting from all others."""
        if self.kind == "column":
            return columns[self.value]
        if self.kind == "columns":
            return [columns[name] for name in self.value]
        if self.kind == "choice":
            return self.value[int(fraction(text) * len(self.value))]
        if self.kind == "integer":
            least, most = self.value
            return least + int(fraction(text) * (most - least + 1))
        if self.kind == "window":
            return [_within(one, f"{text}/{n}") for n, one in enumerate(self.value)]
        return _within(self.value, text)


def fraction(text: str) -> float:
    """A number from 0 to below 1, evenly spread over texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def read_varied(value: Any, where: str) -> Varied:
    """A setting as a file says it; InputError, led by `where`, for what it can't be."""
    if not isinstance(value, dict) or len(value) != 1:
        raise InputError(
            f"{where} = {shown(value)}; give a table of one of: {', '.join(KINDS)}, such as "
            "{ uniform = [0.1, 0.9] }"
        )
    ((kind, held),) = value.items()
    if kind not in KINDS:
        hint = near(kind, KINDS)
        raise InputError(f"{where}: {shown(kind)} is none of: {', '.join(KINDS)}{hint}")
    if not _fits(kind, held):
        raise InputError(f"{where} {kind} = {shown(held)}; give {KINDS[kind]}")
    return Varied(kind, held)


def _fits(kind: str, held: Any) -> bool:
    if kind == "column":
        return isinstance(held, str) and bool(held)
    if not isinstance(held, list) or not held:
        return False
    if kind == "columns":
        return all(isinstance(one, str) and one for one in held)
    if kind == "window":
        return len(held) == 2 and all(_is_range(one, (int, float)) for one in held)
    return kind == "choice" or _is_range(held, int if kind == "integer" else (int, float))


def _is_range(held: Any, numbers: Any) -> bool:
    if not isinstance(held, list) or len(held) != 2:
        return False
    if not all(isinstance(one, numbers) and not isinstance(one, bool) for one in held):
        return False
    return bool(-1e9 <= held[0] <= held[1] <= 1e9)


def _within(ends: list[float], text: str) -> float:
    least, most = ends
    return round(least + fraction(text) * (most - least), DIGITS)
