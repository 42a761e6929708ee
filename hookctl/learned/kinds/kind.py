"""The kinds of weights, and how names and shapes are looked through."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# The width of the text that a model reads, and the base models that have it; 2 of SDXL's levels
# hold transformers, of 640 and 1280 channels.
BASES = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}
BLOCKS = {"SD1.x": 16, "SD2.x": 16, "SDXL": 70}


@dataclass(frozen=True)
class Kind:
    """What a file is.

    name: "gligen box+text", "ip-adapter plus", ...; base: the model that it is for, "" if any;
    facts: what else its shapes tell, a line each; needs: what it takes to be used; hook: whether it
    can be attached by `hookctl.learned.load`.
    """

    name: str
    base: str = ""
    facts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    hook: bool = True

    @property
    def summary(self) -> list[str]:
        """For people: what it is, for which base model, and what it needs."""
        lines = [f"kind: {self.name}"]
        lines += [f"base model: {self.base}"] * bool(self.base)
        lines += self.facts
        lines += [f"needs: {need}" for need in self.needs]
        return lines


def base_of(text: int | None, blocks: int | None = None) -> str:
    """The base model of weights for a text of this width; blocks: the transformers it covers."""
    if text is None:
        return ""
    base = BASES.get(text)
    if base is None or (blocks is not None and blocks != BLOCKS[base]):
        count = "" if blocks is None else f", {blocks} transformer blocks"
        return f"other (text of width {text}{count})"
    return base


def has(shapes: Shapes, pattern: str) -> bool:
    return any(re.search(pattern, key) for key in shapes)


def length(shapes: Shapes, pattern: str, axis: int = 1) -> int | None:
    """The length along an axis of the first tensor of that name."""
    return next(
        (s[axis] for key, s in shapes.items() if re.search(pattern, key) and len(s) > axis), None
    )


def count(shapes: Shapes, pattern: str) -> int:
    return sum(1 for key in shapes if re.search(pattern, key))
