"""Which rows share their probabilities, and as what an operator takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Group(NamedTuple):
    """Output rows of equal probabilities: the row of q, the row of k, and each one's row of v."""

    q: int
    k: int
    values: tuple[int, ...]


def encode(groups: Sequence[Group]) -> list[int]:
    """A flat list, as a custom operator takes it."""
    return [x for g in groups for x in (g.q, g.k, len(g.values), *g.values)]


def decode(integers: Sequence[int]) -> list[Group]:
    found, rest = [], list(integers)
    while rest:
        q, k, count, *rest = rest
        found.append(Group(q, k, tuple(rest[:count])))
        rest = rest[count:]
    return found
