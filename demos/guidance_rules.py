"""What rules of guidance do at an ordinary and at a high guidance, and NAG without any.

    python -m hookctl.demos.guidance_rules --seeds 32

Every column has the same held-out prompts and noises; an image counts if every object is as its
prompt says and nothing else is there. Distances of colours from the palette (RGB) tell how far a
high guidance drives them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl import Editor
from hookctl.demos.guidance import prompts_of
from hookctl.demos.shapes.detect import detect, matches
from hookctl.inspect import markdown_table
from hookctl.recipes import APG, FDG, NAG, TCFG, CFGZeroStar

STEPS, BATCH = 25, 8
GUIDANCES = (3.0, 8.0)
RHO = 15 / 4  # of latents with a sixteenth of SDXL's cells

RULES: dict[str, Callable[[float], Editor | None]] = {
    "plain": lambda g: None,
    "APG": lambda g: APG(rho=RHO),
    "CFGZeroStar": lambda g: CFGZeroStar(),
    "TCFG": lambda g: TCFG(),
    # The published (10, 5) stand beside SDXL's 7.5.
    "FDG": lambda g: FDG((g * 4 / 3, g * 2 / 3)),
}


def draw(
    pipe: Any, prompts: Sequence[str], guidance: float, editor: Editor | None, seed: int = 0
) -> list[Image.Image]:
    """One image for each prompt, prompt i from seed + i."""
    images: list[Image.Image] = []
    with hookctl.control(pipe, *([editor] if editor else [])):
        for i in range(0, len(prompts), BATCH):
            part = list(prompts[i : i + BATCH])
            seeds = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
            images += pipe(
                part, num_inference_steps=STEPS, guidance_scale=guidance, generator=seeds
            ).images
    return images


def judged(prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, float]:
    """strict: the share of images with all objects right and nothing else; colour: the mean
    distance of an object's colour from the palette's."""
    found = [detect(image) for image in images]
    right = [matches(one, prompt) for one, prompt in zip(found, prompts, strict=True)]
    away = [thing.distance for one in found for thing in one.objects]
    return {"strict": float(np.mean(right)), "colour": float(np.mean(away))}


def of_rules(pipe: Any, seeds: int) -> dict[str, dict[str, float]]:
    """Rule -> its figures at each guidance."""
    prompts = prompts_of(0, seeds)
    found: dict[str, dict[str, float]] = {}
    for name, make in RULES.items():
        found[name] = {}
        for g in GUIDANCES:
            figures = judged(prompts, draw(pipe, prompts, g, make(g)))
            found[name] |= {f"{what} {g:g}": value for what, value in figures.items()}
        print(name, {k: round(v, 3) for k, v in found[name].items()}, flush=True)
    return found


# -- a negative word -------------------------------------------------------------------------------

UNSAID = ("a circle", "a square above a star", "a triangle", "a cross and a circle")
NEGATED: dict[str, Callable[[list[str]], Editor]] = {
    "NAG": NAG,
    "NAG, alpha 0.5": lambda words: NAG(words, alpha=0.5),
}


def of_words(pipe: Any, seeds: int) -> dict[str, dict[str, float]]:
    """Prompts that say no colour, drawn without guidance; then without the colour that came.

    Cases are the images whose first object the detector reads. gone: the share of them in which
    nothing has that colour any more; shape: in which the object's shape is still there, in another
    colour.
    """
    prompts = [UNSAID[i % len(UNSAID)] for i in range(seeds)]
    firsts = [detect(image).objects[:1] for image in draw(pipe, prompts, 1.0, None)]
    words = [things[0].colour if things else "red" for things in firsts]
    found: dict[str, dict[str, float]] = {}
    for name, make in NEGATED.items():
        images: list[Image.Image] = []
        for i in range(0, seeds, BATCH):
            part = slice(i, i + BATCH)
            images += draw(pipe, prompts[part], 1.0, make(words[part]), seed=i)
        gone = kept = 0
        for things, image in zip(firsts, images, strict=True):
            if things:
                now = detect(image)
                away = all(one.colour != things[0].colour for one in (*now.objects, *now.extras))
                gone += away
                kept += away and now.find(things[0].shape) is not None
        cases = sum(map(len, firsts))
        found[name] = {"cases": cases, "gone": gone / cases, "shape": kept / cases}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    """Parse the command line, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    found = of_rules(pipe, options.seeds)
    columns = list(next(iter(found.values())))
    print(
        markdown_table(
            [[n, *(f"{v:.2f}" for v in f.values())] for n, f in found.items()], ["rule", *columns]
        )
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
