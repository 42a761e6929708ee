"""Sentences about scenes: which are true, which are held out, and what a sentence asks for."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from .world import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    sample_scene,
)


def relation(a: Thing, b: Thing) -> str | None:
    """Where `a` clearly is with respect to `b` ('left of', ...), or None when it is not clear."""
    dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    if abs(dx) > abs(dy):
        if ax1 <= bx0:
            return "left of"
        return "right of" if bx1 <= ax0 else None
    if abs(dy) > abs(dx):
        if ay1 <= by0:
            return "above"
        return "below" if by1 <= ay0 else None
    return None


def describe(thing: Thing) -> str:
    """'a large striped red circle'; an unsaid size means medium, an unsaid pattern plain."""
    words = [thing.colour, thing.shape]
    if thing.pattern != "plain":
        words.insert(0, thing.pattern)
    if thing.size != "medium":
        words.insert(0, thing.size)
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Draw one of the sentences that are true of a scene (objects in random order)."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    said = [describe(t) for t in things]
    text = said[0]
    if len(things) > 1:
        related = relation(things[0], things[1]) if rng.random() < 0.7 else None
        if len(things) == 2:
            text = f"{said[0]} {related or 'and'} {said[1]}"
        elif related:
            text = f"{said[0]} {related} {said[1]}, and {said[2]}"
        else:
            text = f"{said[0]}, {said[1]} and {said[2]}"
    if rng.random() < 0.6:
        text += f" on a {scene.background} background"
    return text


def is_held_out(text: str) -> bool:
    """Whether a caption belongs to the tenth never trained on (its background does not count)."""
    return zlib.crc32(text.split(" on a ")[0].encode()) % 10 == 0


def sample(
    rng: np.random.Generator,
    count: int | None = None,
    held_out: bool = False,
    counts: tuple[float, float, float] = (0.35, 0.4, 0.25),
    extent: int = IMAGE_SIZE,
) -> tuple[Scene, str]:
    """Draw a scene with a caption from the wanted side of the split (see `sample_scene`)."""
    while True:
        scene = sample_scene(rng, count, counts=counts, extent=extent)
        for _ in range(4):
            text = caption(scene, rng)
            if is_held_out(text) == held_out:
                return scene, text


@dataclass(frozen=True)
class Mention:
    """One object of a sentence."""

    shape: str
    colour: str
    pattern: str = "plain"
    size: str = "medium"
    index: int = 0  # of the noun among the words of the sentence


@dataclass(frozen=True)
class Request:
    """What a sentence asks for: objects in order of mention, the relation of each to the one
    before (None where unsaid), and the background."""

    mentions: tuple[Mention, ...]
    relations: tuple[str | None, ...]
    background: str | None


def parse(text: str) -> Request:
    """Read a caption of the world."""
    words = text.replace(",", " ,").split()
    background = None
    if "background" in words:
        said = words[: words.index("background")]
        background = said[-1] if said and said[-1] in BACKGROUND_NAMES else None
        words = words[: len(words) - 1 - words[::-1].index("on")] if "on" in words else words
    mentions: list[Mention] = []
    relations: list[str | None] = []
    start = 0
    for i, word in enumerate(words):
        if word not in SHAPES:
            continue
        said = words[start:i]
        colour = next((w for w in reversed(said) if w in COLOUR_NAMES), None)
        if colour is None:
            raise ValueError(f"no colour is said of the {word} in {text!r}; one of {COLOUR_NAMES}")
        size = next((s for s in ("small", "large") if s in said), "medium")
        pattern = "striped" if "striped" in said else "plain"
        mentions.append(Mention(word, colour, pattern, size, i))
        relations.append(next((r for r in RELATIONS if r.split()[0] in said), None))
        start = i + 1
    return Request(tuple(mentions), tuple(relations), background)
