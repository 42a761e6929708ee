"""The world of the embedded pipeline: flat shapes on a flat background.

A scene has one to three objects whose centres lie on a 16 px lattice (two cells of the f8 latents)
in an image of 128 x 128 px. Everything a test may ask (boxes, masks, relations) is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 128  # px, both sides
LATTICE = 8  # px, the cell of the latents
SPACING = 16  # px between the places where a centre may be
GAP = 8  # px at least between the boxes of two objects
STAMP = 64  # px, side of the square in which any object fits

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 40),
    "green": (30, 165, 60),
    "blue": (40, 75, 235),
    "yellow": (255, 225, 40),
    "purple": (150, 45, 190),
    "orange": (250, 128, 15),
}
PATTERNS = ("plain", "striped")
SIZES: dict[str, int] = {"small": 13, "medium": 18, "large": 25}  # radius, px
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
}
RELATIONS = ("left of", "right of", "above", "below")
STRIPE = 4  # px, height of one bar; dark bars are the odd ones
SHADE = 0.55  # brightness of the dark bars
WORDS = (
    *SHAPES, *COLOURS, "striped", "small", "large", *BACKGROUNDS, "background",
    "a", "an", "and", "on", "left", "right", "of", "above", "below", ",",
)  # fmt: skip

COLOUR_NAMES = tuple(COLOURS)
SIZE_NAMES = tuple(SIZES)
BACKGROUND_NAMES = tuple(BACKGROUNDS)

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in px, the last two exclusive


@dataclass(frozen=True)
class Thing:
    """One object; `centre` is (x, y) in px."""

    shape: str
    colour: str
    pattern: str = "plain"
    size: str = "medium"
    centre: tuple[int, int] = (IMAGE_SIZE // 2, IMAGE_SIZE // 2)

    @property
    def box(self) -> Box:
        """The exact bounding box (x0, y0, x1, y1) of the object's mask, in px."""
        x0, y0, x1, y1 = stamp_box(self.shape, self.size)
        x, y = self.centre
        return x + x0, y + y0, x + x1, y + y1

    def mask(self) -> NDArray[np.bool_]:
        """The pixels that the object covers by at least half: bool, [128, 128]."""
        mask = np.zeros((IMAGE_SIZE + 2 * STAMP, IMAGE_SIZE + 2 * STAMP), dtype=bool)
        x, y = (c + STAMP // 2 for c in self.centre)
        mask[y : y + STAMP, x : x + STAMP] = stamp(self.shape, self.size) >= 0.5
        return mask[STAMP : STAMP + IMAGE_SIZE, STAMP : STAMP + IMAGE_SIZE]


@dataclass(frozen=True)
class Scene:
    """A background and one to three things that do not overlap."""

    things: tuple[Thing, ...]
    background: str = "white"


# --------------------------------------------------------------------------- geometry


def _polygon(shape: str, radius: float) -> NDArray[np.float64]:
    """The corners of a shape about the origin, px, y downwards: [corners, 2]."""
    if shape == "square":
        half = float(round(0.88 * radius))
        return np.array([(-half, -half), (half, -half), (half, half), (-half, half)], float)
    if shape == "triangle":
        top, base, half = -1.1 * radius, 0.8 * radius, 1.12 * radius
        return np.array([(0.0, top), (half, base), (-half, base)])
    if shape == "star":
        step = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.2, 0.5) * radius
        return np.stack([reach * np.sin(step), 0.08 * radius - reach * np.cos(step)], axis=1)
    arm, half = round(1.05 * radius), round(0.36 * radius)
    return np.array(
        [(-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half),
         (half, arm), (-half, arm), (-half, half), (-arm, half), (-arm, -half), (-half, -half)],
        float,
    )  # fmt: skip


def distance(
    shape: str, radius: float, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Signed distance in px (negative inside) from points `x`, `y` to a shape at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    corners = _polygon(shape, radius)
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ey != 0:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -nearest, nearest)


@cache
def stamp(shape: str, size: str) -> NDArray[np.float32]:
    """The coverage, 0 to 1, of an object at the middle of a 64 x 64 px square: [64, 64]."""
    at = np.arange(STAMP) + 0.5 - STAMP / 2
    x, y = np.meshgrid(at, at)
    cover = np.clip(0.5 - distance(shape, SIZES[size], x, y), 0.0, 1.0).astype(np.float32)
    cover.setflags(write=False)
    return cover


@cache
def stamp_box(shape: str, size: str) -> Box:
    """The box of an object's mask relative to its centre, px."""
    ys, xs = np.nonzero(stamp(shape, size) >= 0.5)
    half = STAMP // 2
    return (
        int(xs.min()) - half, int(ys.min()) - half,
        int(xs.max()) + 1 - half, int(ys.max()) + 1 - half,
    )  # fmt: skip


# --------------------------------------------------------------------------- sampling


def _apart(a: Box, b: Box, gap: int) -> bool:
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


def sample_scene(
    rng: np.random.Generator,
    count: int | None = None,
    lattice: int = SPACING,
    counts: tuple[float, float, float] = (0.35, 0.4, 0.25),
    extent: int = IMAGE_SIZE,
    gap: int = GAP,
) -> Scene:
    """Draw a scene.

    Receives: `rng`; the number of objects (drawn with weights `counts` when None); the `lattice`
    of centres in px (1 for any pixel); the side in px of the top left square to stay within.
    Returns: a scene whose boxes are at least `gap` px apart.
    """
    if count is None:
        count = 1 + int(np.searchsorted(np.cumsum(counts), rng.random() * sum(counts)))
    background = BACKGROUND_NAMES[rng.integers(len(BACKGROUND_NAMES))]
    large = (0.4, 0.35, 0.2)[count - 1]
    while True:
        things: list[Thing] = []
        draw = rng.random((count, 30, 2))
        kinds = rng.permutation(len(SHAPES) * len(COLOUR_NAMES))[:count]
        for i in range(count):
            shape, colour = SHAPES[kinds[i] % 5], COLOUR_NAMES[kinds[i] // 5]
            u, v = rng.random(2)
            size = "large" if u < large else "medium" if u < 0.65 else "small"
            pattern = "striped" if v < 0.28 else "plain"
            x0, y0, x1, y1 = stamp_box(shape, size)
            low = (-((x0 - 2) // lattice), -((y0 - 2) // lattice))
            high = ((extent - 2 - x1) // lattice, (extent - 2 - y1) // lattice)
            for t in draw[i]:
                x = (low[0] + int(t[0] * (high[0] - low[0] + 1))) * lattice
                y = (low[1] + int(t[1] * (high[1] - low[1] + 1))) * lattice
                box = (x + x0, y + y0, x + x1, y + y1)
                if all(_apart(box, other.box, gap) for other in things):
                    things.append(Thing(shape, colour, pattern, size, (x, y)))
                    break
            else:
                break
        if len(things) == count:
            return Scene(tuple(things), background)


def ghost(
    scene: Scene, rng: np.random.Generator, beside: bool = False
) -> tuple[Scene, Scene, bool] | None:
    """One thing of a scene taken away, and a copy of it elsewhere instead, or one place beside.

    Returns: the scene without the thing; with its copy in another place that the rest leaves free;
    and whether that place is clear of the old one. None where no place was free.
    """
    which = int(rng.integers(len(scene.things)))
    thing = scene.things[which]
    others = tuple(other for i, other in enumerate(scene.things) if i != which)
    for t in rng.random((12, 2)):
        if beside:  # one of the eight neighbours, or the place itself, which is refused below
            x, y = (c + SPACING * (int(3 * v) - 1) for c, v in zip(thing.centre, t, strict=True))
        else:
            x, y = (SPACING * int(1 + v * (IMAGE_SIZE // SPACING - 1)) for v in t)
        copy = replace(thing, centre=(x, y))
        box = copy.box
        inside = min(box[:2]) >= 2 and max(box[2:]) <= IMAGE_SIZE - 2
        if (x, y) != thing.centre and inside and all(_apart(box, o.box, GAP) for o in others):
            rest, moved = Scene(others, scene.background), Scene((*others, copy), scene.background)
            return rest, moved, _apart(box, thing.box, 0)
    return None


def mistake(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Scene] | None:
    """One thing of a scene taken away, and a copy of another one in its place.

    Returns: the scene without the thing; with the copy. None where the scene has one thing only,
    or the copy has no room there.
    """
    if len(scene.things) < 2:
        return None
    which, step = int(rng.integers(len(scene.things))), int(rng.integers(1, len(scene.things)))
    thing, other = scene.things[which], scene.things[(which + step) % len(scene.things)]
    rest = tuple(o for i, o in enumerate(scene.things) if i != which)
    copy = replace(other, centre=thing.centre)
    inside = min(copy.box[:2]) >= 2 and max(copy.box[2:]) <= IMAGE_SIZE - 2
    if not inside or not all(_apart(copy.box, o.box, GAP) for o in rest):
        return None
    return Scene(rest, scene.background), Scene((*rest, copy), scene.background)
