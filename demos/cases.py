"""Edit cases on the embedded world: prompts drawn at random, and what an edit was to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hookctl.demos.shapes.captions import is_held_out, parse
from hookctl.demos.shapes.world import COLOUR_NAMES, RELATIONS, SHAPES


@dataclass(frozen=True)
class EditCase:
    """One edit: the source and target prompts and the object that changes.

    before, after: (shape, colour, pattern) of the edited object, after None if it is to go; other:
    of the object that must stay; words: the edited object's noun in source and target; options: for
    the recipe.
    """

    kind: str
    source: str
    target: str
    before: tuple[str, str, str]
    after: tuple[str, str, str] | None
    other: tuple[str, str, str]
    words: tuple[str, str]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        if self.after is None:
            gains = ", ".join(f"{w} x {g:g}" for w, g in self.options["reweight"].items())
            return f"{self.kind}: {_say(*self.before)}, {gains}"
        return f"{self.kind}: {_say(*self.before)} to {_say(*self.after)}"


def _say(shape: str, colour: str, pattern: str) -> str:
    return f"striped {colour} {shape}" if pattern == "striped" else f"{colour} {shape}"


def _article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _other_than(rng: np.random.Generator, names: tuple[str, ...], *taken: str) -> str:
    return str(rng.choice([name for name in names if name not in taken]))


def draw(kind: str, rng: np.random.Generator) -> EditCase:
    """A random two-object case of one kind; source and target are held-out captions."""
    while True:
        case = _draw(kind, rng)
        if is_held_out(case.source) and (case.source == case.target or is_held_out(case.target)):
            return case


def _draw(kind: str, rng: np.random.Generator) -> EditCase:
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(COLOUR_NAMES))
    # Another shape and another colour, so that each word names one object.
    other = (_other_than(rng, SHAPES, shape), _other_than(rng, COLOUR_NAMES, colour), "plain")
    before = (shape, colour, "plain")
    after: tuple[str, str, str] | None = before
    options: dict[str, Any] = {}
    if kind == "colour":
        after = (shape, _other_than(rng, COLOUR_NAMES, colour, other[1]), "plain")
    elif kind == "shape":
        after = (_other_than(rng, SHAPES, shape, other[0]), colour, "plain")
    elif kind == "added word":
        after = (shape, colour, "striped")
    elif kind == "reweight":
        # The noun carries the object: attention pushed away from it leaves the object out.
        after, options = None, {"reweight": {shape: -1.0}}
    else:
        raise ValueError(f"no edit of kind {kind!r}")
    relation, background = str(rng.choice(RELATIONS)), str(rng.choice(("white", "gray", "black")))

    def sentence(thing: tuple[str, str, str]) -> str:
        first, second = _article(_say(*thing)), _article(_say(*other))
        return f"{first} {relation} {second} on a {background} background"

    source = sentence(before)
    target = source if after is None else sentence(after)
    parse(source), parse(target)  # both must be sentences of the world
    return EditCase(
        kind,
        source,
        target,
        before,
        after,
        other,
        (shape, shape if after is None else after[0]),
        options,
    )
