"""What the verbs of `AttentionCall` do to terms, once all editors have spoken.

Each operation rewrites the terms of its rows. They are folded stage by stage, so that editors
compose in whatever order they spoke; inside a stage they are folded in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from hookctl.address.rows import Row
from hookctl.attention.term import Combination, Divided, Sum, Terms


class Stage(IntEnum):
    """The order in which operations are folded into terms."""

    SUBSTITUTION = 0
    EXTENSION = 1
    RESTRICTION = 2
    TOKEN_MAP = 3
    ADDITION = 4
    OVERRIDE = 5
    COMBINATION = 6
    READ_OUT = 7


Probabilities = Callable[[Tensor], Tensor]
Sink = Callable[[Row, Tensor], None]


@dataclass(eq=False, slots=True)
class Fold:
    """The state of a fold.

    terms: as rewritten so far; before: as they were when the stage began; values: per row that was
    substituted, the terms whose values and weights make up its own values; functions: what edits
    the probabilities of a row; divided: per row, what divisions add to it; combined: per row, what
    is made of its output.
    """

    terms: Terms
    before: Terms
    values: Terms
    functions: dict[int, list[Probabilities]]
    divided: dict[int, list[Divided]] = field(default_factory=dict)
    combined: dict[int, list[Combination]] = field(default_factory=dict)


# What a verb does to the terms of a row.
Rewriting = Callable[[Fold, int], None]


class Operation(NamedTuple):
    """One use of a verb by one editor."""

    stage: Stage
    editor: Any
    verb: str
    rows: tuple[int, ...]
    apply: Rewriting


class ReadOut(NamedTuple):
    """A request for the probabilities of some key tokens, averaged over heads.

    summed: over the image's queries, in place of one value for each; queries: of these alone, in
    place of the image's; heads: one value for each head, in place of their mean; joined: one value
    for all of the tokens, their sum; editor: who asks.
    """

    row: Row
    tokens: tuple[int, ...]
    into: Sink
    summed: bool = False
    queries: tuple[int, ...] = ()
    heads: bool = False
    joined: bool = False
    editor: Any = None


class OutputRead(NamedTuple):
    """A request for the output of the image's queries, or of a further text's own ones.

    text: the name of that text; editor: who asks.
    """

    row: Row
    into: Sink
    text: str | None = None
    editor: Any = None


_stage = attrgetter("stage")


def folded(terms: Terms, operations: Iterable[Operation], rows: int, mask: Tensor | None) -> Sum:
    """The finished sum of a call of `rows` rows: every operation applied, stage by stage.

    terms: of rows that nothing has rewritten yet.
    """
    state = Fold(terms, terms, terms, {})
    stage = Stage.SUBSTITUTION
    for operation in sorted(operations, key=_stage):
        if operation.stage is not stage:
            state.before = terms.snapshot()
            if stage is Stage.SUBSTITUTION:
                state.values = state.before
            stage = operation.stage
        for row in operation.rows:
            operation.apply(state, row)
    return Sum(terms, rows, mask, state.functions, state.divided, state.combined)
