"""Sets of images, maps of change and prompts that change, on either embedded pipeline.

    python -m hookctl.demos.further --seeds 32
    python -m hookctl.demos.further --seeds 32 --model shapes-flow

Sets: of three images, "a striped red star", "a red star above a blue circle", "a red star left of a
green square", each from a noise of its own. The first alone is said to be striped, and what the
background is nobody says.
Edits: of two objects one is asked for in another colour; Differential Diffusion is given a rendered
image and where it may change, a prompt schedule begins with the old colour and the noise. Every
column has the noises of the plain run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl import Editor
from hookctl.demos.cases import EditCase, draw
from hookctl.demos.figures import measure, summary
from hookctl.demos.flow import box_of
from hookctl.demos.inversion import images_of
from hookctl.demos.models import SHAPES_FLOW, call_of, figures_table, opened, script
from hookctl.demos.shapes.captions import describe
from hookctl.demos.shapes.detect import detect
from hookctl.demos.shapes.world import COLOUR_NAMES, IMAGE_SIZE, Thing
from hookctl.demos.shapes.world import SHAPES as SHAPE_NAMES
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import ConsiStory, DifferentialDiffusion, PromptSchedule, StoryDiffusion
from hookctl.recipes.common.source_and_edits import SourceAndEdits

STEPS, GUIDANCE, SHOWN = 25, 3.0, 4
FALL, CHANGE = 0.1, 0.3  # of the image's side, of the schedule
Figures = dict[str, float]


def called(pipe: Any) -> dict[str, Any]:
    return {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **call_of(pipe)}


# -- sets ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Set:
    """A subject, and what stands beside it in the second image and in the third."""

    subject: Thing
    others: tuple[Thing, Thing]

    @property
    def prompts(self) -> list[str]:
        striped, (second, third) = replace(self.subject, pattern="striped"), self.others
        first, noun = describe(striped), describe(self.subject)
        return [
            first,
            f"{noun} above {describe(second)}",
            f"{noun} left of {describe(third)}",
        ]


def draw_set(rng: np.random.Generator) -> Set:
    """Three shapes in three colours."""
    shapes, colours = (rng.permutation(names)[:3] for names in (SHAPE_NAMES, COLOUR_NAMES))
    first, *others = (Thing(str(s), str(c)) for s, c in zip(shapes, colours, strict=True))
    return Set(first, (others[0], others[1]))


Draws = Callable[[Set], SourceAndEdits]
SETS: Mapping[str, Draws | None] = {
    "plain": None,
    "StoryDiffusion": lambda one: StoryDiffusion(one.prompts),
    "ConsiStory": lambda one: ConsiStory(one.prompts, one.subject.shape),
}
SETS_ON_FLOW: Mapping[str, Draws | None] = {
    **SETS,
    "ConsiStory": lambda one: ConsiStory(one.prompts, one.subject.shape, injected=0.0),
}


def draw_images(pipe: Any, one: Set, make: Draws | None, seed: int) -> list[Image.Image]:
    """The three images of a set, from the noises of seed to seed + 2."""
    if make is not None:
        made: list[Image.Image] = make(one).run(pipe, seed=seed, **called(pipe))
        return made
    noises = [torch.Generator().manual_seed(seed + i) for i in range(3)]
    plain: list[Image.Image] = pipe(one.prompts, generator=noises, **called(pipe)).images
    return plain


def consistency(sets: Sequence[Set], drawn: Sequence[Sequence[Image.Image]]) -> Figures:
    """one background: share of the sets with one in all images; striped: of the later images whose
    subject is; right: of all images with the objects of their prompt and nothing else, whatever
    their patterns."""
    striped, background, right = [], [], []
    for one, images in zip(sets, drawn, strict=True):
        found = [detect(image) for image in images]
        background.append(len({each.background for each in found}) == 1)
        for each, other in zip(found, (None, *one.others), strict=True):
            subject = each.find(one.subject.shape, one.subject.colour)
            there = other is None or each.find(other.shape, other.colour) is not None
            alone = len(each.objects) == 1 + (other is not None) and not each.extras
            right.append(subject is not None and there and alone)
            if other is not None:
                striped.append(subject is not None and subject.pattern == "striped")
    shares = {"one background": background, "striped": striped, "right": right}
    return {name: float(np.mean(values)) for name, values in shares.items()}


def of_sets(
    pipe: Any, seeds: int, methods: Mapping[str, Draws | None], seed: int = 0
) -> tuple[dict[str, Figures], list[list[Image.Image]]]:
    """Method -> its figures, and the rows of a grid: the images of a set by every method."""
    rng = np.random.default_rng([seed, 10])
    sets = [draw_set(rng) for _ in range(seeds)]
    found: dict[str, Figures] = {}
    rows: list[list[Image.Image]] = [[] for _ in sets]
    for name, make in methods.items():
        drawn = [draw_images(pipe, one, make, seed + 3 * i) for i, one in enumerate(sets)]
        found[name] = consistency(sets, drawn)
        rows = [[*row, *images] for row, images in zip(rows, drawn, strict=True)]
        print(name, found[name], flush=True)
    return found, rows


# -- edits -----------------------------------------------------------------------------------------


def change_map(image: Image.Image, case: EditCase, fall: float = FALL) -> np.ndarray:
    """1 in the box of the object that changes, falling to 0 over a share `fall` of the image."""
    left, top, right, bottom = box_of(image, case)
    at = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    across, down = (
        np.maximum(np.maximum(start - at, at - end), 0)
        for start, end in ((left, right), (top, bottom))
    )
    away = np.maximum(across[None], down[:, None])
    return np.asarray(np.clip(1 - away / fall, 0, 1) if fall else away == 0, float)


def one_image(pipe: Any, prompt: str, seed: int, *editors: Editor) -> Image.Image:
    with hookctl.control(pipe, *editors):
        made: Image.Image = pipe(
            prompt, generator=torch.Generator().manual_seed(seed), **called(pipe)
        ).images[0]
    return made


def differential(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    edit = DifferentialDiffusion(image, change_map(image, case))
    return one_image(pipe, case.target, seed, edit)


def scheduled(pipe: Any, image: Image.Image, case: EditCase, seed: int) -> Image.Image:
    """The whole sentence is another one from CHANGE on."""
    edit = PromptSchedule(f"[{case.source}:{case.target}:{CHANGE}]")
    return one_image(pipe, edit.prompts[0], seed, edit)


def of_edits(
    pipe: Any, seeds: int, seed: int = 0
) -> tuple[dict[str, Figures], list[list[Image.Image]]]:
    """Of rendered images with Differential Diffusion, then of the model's own with a schedule.

    The rows of a grid are the image, the new caption's from the same noise
    and the edit, twice.
    """
    rng = np.random.default_rng([seed, 11])
    cases = [draw("colour", rng) for _ in range(seeds)]
    noises = range(seed, seed + seeds)
    rendered = images_of(cases, rng)
    own = [one_image(pipe, case.source, n) for case, n in zip(cases, noises, strict=True)]
    anew = [one_image(pipe, case.target, n) for case, n in zip(cases, noises, strict=True)]
    found: dict[str, Figures] = {}
    rows: list[list[Image.Image]] = [[] for _ in cases]
    ways: list[tuple[str, list[Image.Image], Callable[..., Image.Image]]] = [
        ("DifferentialDiffusion", rendered, differential),
        ("PromptSchedule", own, scheduled),
    ]
    for name, images, edit in ways:
        edited = [edit(pipe, *one) for one in zip(images, cases, noises, strict=True)]
        for title, made in ((f"{name}: plain", anew), (name, edited)):
            found[title] = judged(cases, images, made)
            print(title, found[title], flush=True)
        rows = [[*row, *three] for row, *three in zip(rows, images, anew, edited, strict=True)]
    return found, rows


def judged(
    cases: Sequence[EditCase], before: Sequence[Image.Image], after: Sequence[Image.Image]
) -> Figures:
    """Of the cases whose first image has both objects: see `figures.measure`; both: the edit is
    there and the other object kept."""
    valid = [
        measure(case, a, b)
        for case, a, b in zip(cases, before, after, strict=True)
        if all(detect(a).find(*thing[:2]) is not None for thing in (case.before, case.other))
    ]
    both = float(np.mean([one.edit_success and one.kept for one in valid]))
    return {"cases": len(valid), **summary(valid), "both": both}


def main() -> None:
    """Parse the command line, draw and print."""
    parser = script(__doc__)
    parser.add_argument("--out", type=Path, help="write all figures and images here")
    options = parser.parse_args()
    pipe = opened(options.model)
    flow = options.model == SHAPES_FLOW
    parts = {
        "sets": of_sets(pipe, options.seeds, SETS_ON_FLOW if flow else SETS),
        "edits": of_edits(pipe, options.seeds),
    }
    for name, (found, rows) in parts.items():
        print(figures_table(found))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            save_image(show.grid(rows[:SHOWN], cell=(96, 96)), options.out / f"{name}.png")
    if options.out:
        write_json(options.out / "report.json", {name: found for name, (found, _) in parts.items()})


if __name__ == "__main__":
    main()
