"""Which layer: the attention sites of a model, their names, and how to select them.

A *site* is one attention layer. It is addressed by what it is (self, cross, joint, temporal; text
where only text attends to itself, gated: the image with its grounding tokens), by its place (down,
mid, up, or blocks for a transformer) and by its resolution **relative to the latent**: at
resolution 1/4 of a 64 x 64 latent the layer sees 16 x 16 tokens, and it is the same layer at any
image size.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from hookctl.errors import SelectorError

KINDS = ("self", "cross", "joint", "temporal", "text", "gated")
# What only prepares the text: no selector picks it that does not name it.
NAMED_ONLY = ("text",)
PLACES = ("down", "mid", "up", "blocks", "other")


@dataclass(frozen=True)
class Site:
    """One attention layer.

    path: of its module inside the denoiser; resolution: side of its token grid over the side of
    the latent (None where the model gives no way to know before it runs); depth: how many sites
    of the same kind come before it in the same place; heads: None if the module does not say.
    """

    path: str
    kind: str
    place: str
    block: int
    depth: int
    resolution: Fraction | None = None
    heads: int | None = None

    @property
    def label(self) -> str:
        at = f"@{self.resolution}" if self.resolution is not None else ""
        return f"{self.place}{self.block}.{self.kind}{self.depth}{at}"


Test = Callable[[Site], bool]
Compare = Callable[[Any, Any], bool]
Selector = str | Test | Sequence[str] | None

_COMPARE: dict[str, Compare] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "": operator.eq,
}


def matcher(selector: Selector) -> Test:
    """Turn a selector into a predicate, which can be pickled if the selector can.

    A selector is a predicate, a list of paths or globs, None (every site of the image), or text:
    words joined by spaces must all hold, alternatives are split by commas. Sites of the kind
    `text` are picked by their kind's name or their path alone. A word
    is a kind (`cross`), a place (`up`, `up1`), a resolution (`@1/4`, `@<=1/2`), or a glob on the
    path (`up_blocks.*`). `!` before a word negates it. Example: ``"self up @<=1/2, mid"``.
    """
    if selector is None:
        return _of_image
    if callable(selector):
        return partial(_asked, selector)
    if isinstance(selector, list | tuple) and selector:
        tests = [matcher(one) for one in selector if one is not None]
        if len(tests) == len(selector):
            return partial(_any_of, tests)
    if not isinstance(selector, str):
        raise SelectorError(
            f"sites={selector!r}; give a text such as 'cross' or 'self up @<=1/2', a list of "
            "paths, a function of a Site, or None for all"
        )
    alternatives = [_alternative(part.split()) for part in selector.split(",") if part.strip()]
    if not alternatives:
        raise SelectorError(f"sites={selector!r} is empty; give e.g. 'cross', 'self up @<=1/2'")
    return partial(_any_of, alternatives)


def _of_image(site: Site) -> bool:
    return site.kind not in NAMED_ONLY


def _any_of(tests: Sequence[Test], site: Site) -> bool:
    return any(test(site) for test in tests)


def _all_of(tests: Sequence[Test], site: Site) -> bool:
    return all(test(site) for test in tests)


def _alternative(words: Sequence[str]) -> Test:
    """A predicate of words that must all hold."""
    tests = [_word(word) for word in words]
    return partial(_all_of, tests if any(map(_names, words)) else [_of_image, *tests])


def _names(word: str) -> bool:
    """Whether a word is a path, or one of the kinds that must be named."""
    plain = (*KINDS, *PLACES, "all", "*")
    placed = re.fullmatch(rf"({'|'.join(PLACES)})\d+", word)
    path = word not in plain and not placed and word[0] not in "@!"
    return word in NAMED_ONLY or path


def _asked(selector: Test, site: Site) -> bool:
    """What a user's own function says of a site."""
    try:
        return bool(selector(site))
    except Exception as error:
        raise SelectorError(
            f"sites={selector!r} fails for {site.path}, by {type(error).__name__}: {error}; give a "
            "function of a Site that returns True or False"
        ) from error


def _word(word: str) -> Test:
    if word.startswith("!"):
        return partial(_is_not, _word(word[1:]))
    if word in ("all", "*"):
        return partial(_all_of, ())
    if word in KINDS:
        return partial(_has, {"kind": word})
    if word in PLACES:
        return partial(_has, {"place": word})
    if placed := re.fullmatch(rf"({'|'.join(PLACES)})(\d+)", word):
        return partial(_has, {"place": placed[1], "block": int(placed[2])})
    if word.startswith("@"):
        parsed = re.fullmatch(r"@(<=|>=|<|>|=|)(\d+(?:/\d+)?)", word)
        if not parsed:
            raise SelectorError(
                f"{word!r} is not a resolution; give a fraction of the latent's side, "
                "such as @1/4 or @<=1/2"
            )
        if parsed[2].endswith("/0") or len(parsed[2]) > 20:
            raise SelectorError(f"{word!r} is no resolution; give e.g. @1/4")
        return partial(_is_of_resolution, _COMPARE[parsed[1]], Fraction(parsed[2]))
    return partial(_is_at, word)


def _is_not(test: Test, site: Site) -> bool:
    return not test(site)


def _has(wanted: Mapping[str, Any], site: Site) -> bool:
    return all(getattr(site, name) == value for name, value in wanted.items())


def _is_of_resolution(compare: Compare, value: Fraction, site: Site) -> bool:
    return site.resolution is not None and compare(site.resolution, value)


def _is_at(path: str, site: Site) -> bool:
    return fnmatch.fnmatchcase(site.path, path)


def select(sites: Iterable[Site], selector: Selector, *, who: str = "") -> tuple[Site, ...]:
    """The sites that a selector matches, in model order.

    Raises SelectorError, naming what there is, if it matches none.
    """
    every = tuple(sites)
    test = matcher(selector)
    chosen = tuple(site for site in every if test(site))
    if chosen or not every:
        return chosen
    kinds = sorted({site.kind for site in every})
    places = sorted({f"{site.place}{site.block}" for site in every})
    grids = sorted({site.resolution for site in every if site.resolution is not None})
    aside = ""
    if isinstance(selector, str) and "controlnet" in selector.lower():
        aside = " A ControlNet's own attention is not hooked: only the denoiser's can be edited."
    raise SelectorError(
        f"{who + ': ' if who else ''}sites={selector!r} matches none of the {len(every)} sites. "
        f"Kinds: {', '.join(kinds)}; places: {', '.join(places)}; resolutions: "
        f"{', '.join(map(str, grids)) or 'unknown'}; paths are like {every[0].path!r}.{aside}"
    )


@dataclass(frozen=True)
class Grid:
    """The grid that image tokens form: `height, width = grid`, in tokens, and so many frames.

    Tokens are laid out frame by frame, and in each row by row: `x.reshape(frames, height, width)`.
    """

    height: int
    width: int
    frames: int = 1

    def __iter__(self) -> Iterator[int]:
        """height and width"""
        yield self.height
        yield self.width

    @property
    def tokens(self) -> int:
        """How many there are, of all frames."""
        return self.frames * self.height * self.width

    def cells(self, y: float, x: float) -> list[int]:
        """The token of each frame in which a place lies; y, x: fractions of height and width."""
        row, column = (min(int(p * n), n - 1) for p, n in zip((y, x), self, strict=True))
        return [(frame * self.height + row) * self.width + column for frame in range(self.frames)]


@dataclass(frozen=True)
class ImageTokens:
    """The images of one sequence, in its order; target: which of them is drawn."""

    grids: tuple[Grid, ...]
    target: int = 0

    @property
    def count(self) -> int:
        """Tokens of all images together."""
        return sum(grid.tokens for grid in self.grids)

    @property
    def span(self) -> tuple[int, int]:
        """Where the target's tokens are, from and to."""
        start = sum(grid.tokens for grid in self.grids[: self.target])
        return start, start + self.grids[self.target].tokens

    @property
    def references(self) -> tuple[Grid, ...]:
        """The grids of the others."""
        return (*self.grids[: self.target], *self.grids[self.target + 1 :])


def grid_of(tokens: int, latent: Sequence[int], sequences: int = 1) -> Grid | None:
    """The grid that `tokens` image tokens form over a latent, ([frames,] height, width) or ().

    sequences: into how many a row's tokens are divided: 1, where those of all frames may stand in
    one, or as many as there are frames. Tries every whole reduction of the latent, rounding up
    (strided convolutions) and down (patches). None if there is none, as where each sequence is of
    one place through all frames.
    """
    if len(latent) < 2:
        return None
    *front, height, width = latent
    frames: int = front[-1] if front else 1
    if sequences > frames:
        return None
    for count in dict.fromkeys((frames, 1) if sequences == 1 else (1,)):
        for reduction in range(1, max(height, width) + 1):
            for up in (True, False):
                h = -(-height // reduction) if up else height // reduction
                w = -(-width // reduction) if up else width // reduction
                if h and w and count * h * w == tokens:
                    return Grid(h, w, count)
    return None
