"""A scene grown round a given image: the cases, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hookctl.demos.shapes.captions import describe
from hookctl.demos.shapes.detect import Detection, detect
from hookctl.demos.shapes.render import drawn
from hookctl.demos.shapes.world import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    COLOUR_NAMES,
    IMAGE_SIZE,
    PATTERNS,
    SHAPES,
    Scene,
    Thing,
)
from hookctl.loop.images import decode, encode

CANVAS = "gray"  # the background of the canvas that an image is pasted on
SIDE = IMAGE_SIZE // 2
AT = ((IMAGE_SIZE - SIDE) // 2, 0)
BOX = (*AT, AT[0] + SIDE, AT[1] + SIDE)
SAME = 40.0  # RGB distance up to which two backgrounds are one


@dataclass(frozen=True)
class Case:
    """The object of the given image and its background, and the object that is wanted below."""

    given: Thing
    wanted: Thing
    background: str = CANVAS

    @property
    def prompt(self) -> str:
        said = f"{describe(self.given)} above {describe(self.wanted)}"
        return f"{said} on a {CANVAS} background" if self.background == CANVAS else said

    @property
    def image(self) -> Image.Image:
        (whole,) = drawn([Scene((self.given,), self.background)])
        left = (IMAGE_SIZE - SIDE) // 2
        return whole.crop((left, left, left + SIDE, left + SIDE))


def cases(seed: int, count: int, said: bool = True) -> list[Case]:
    """said: whether the images have the canvas's background and the prompts say so."""
    rng = np.random.default_rng([seed, 5])
    others = [background for background in BACKGROUND_NAMES if background != CANVAS]
    made = []
    for i in range(count):
        shapes, colours = rng.permutation(SHAPES)[:2], rng.permutation(COLOUR_NAMES)[:2]
        given, wanted = (
            Thing(str(s), str(c), str(rng.choice(PATTERNS)))
            for s, c in zip(shapes, colours, strict=True)
        )
        made.append(Case(given, wanted, CANVAS if said else others[i % len(others)]))
    return made


def restored(pipe: Any, every: Sequence[Case]) -> list[Image.Image]:
    """A canvas of the image's background with the image on it, through the autoencoder and back."""
    made = []
    for case in every:
        canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[case.background])
        canvas.paste(case.image, AT)
        made += decode(pipe, encode(pipe, canvas))
    return made


# -- what became of them ---------------------------------------------------------------------------


def seed_psnr(case: Case, image: Image.Image) -> float:
    """dB, of the given image's place on the canvas, peak 255."""
    a, b = (np.asarray(x, float) for x in (image.crop(BOX), case.image))
    return float(10 * np.log10(255.0**2 / max(((a - b) ** 2).mean(), 1e-10)))


def mean_psnr(every: Sequence[Case], drawn: Sequence[Image.Image]) -> float:
    found = [seed_psnr(case, image) for case, image in zip(every, drawn, strict=True)]
    return round(float(np.mean(found)), 2)


def obeyed(case: Case, detection: Detection) -> bool:
    """Whether the wanted object is there, outside the given image."""
    found = detection.find(case.wanted.shape, case.wanted.colour)
    if found is None or found.pattern != case.wanted.pattern:
        return False
    x, y = found.centre
    return not (BOX[0] <= x < BOX[2] and BOX[1] <= y < BOX[3])


def surroundings(image: Image.Image) -> NDArray[np.float64]:
    """The colour of most of what surrounds the given image, RGB from 0 to 255."""
    pixels = np.asarray(image, float)
    outside = np.ones(pixels.shape[:2], bool)
    outside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = False
    colour: NDArray[np.float64] = np.median(pixels[outside], axis=0)
    return colour


def continued(case: Case, image: Image.Image) -> bool:
    """Whether that is the given image's background."""
    return float(np.linalg.norm(surroundings(image) - BACKGROUNDS[case.background])) <= SAME


def figures(every: Sequence[Case], drawn: Sequence[Image.Image]) -> dict[str, float]:
    seen = [(case, image, detect(image)) for case, image in zip(every, drawn, strict=True)]
    shares = {
        "given_object": [d.find(c.given.shape, c.given.colour) is not None for c, _, d in seen],
        "text_obeyed_outside": [obeyed(c, d) for c, _, d in seen],
        "background_continued": [continued(c, p) for c, p, _ in seen],
    }
    return {
        "seed_psnr": mean_psnr(every, drawn),
        **{name: round(float(np.mean(found)), 3) for name, found in shares.items()},
    }
