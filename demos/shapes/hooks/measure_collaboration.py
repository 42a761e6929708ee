"""Measures a trained collaboration: colours from the text, places from the mask.

    python -m hookctl.demos.shapes.hooks.measure_collaboration out/hooks/collaboration.safetensors

Captions say shapes and colours, masks say shapes and places, of scenes that were never trained on.
An object has its colour if one of its shape and colour is found anywhere, and its place if anything
covers its mask with an intersection over union of a half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import hookctl
from hookctl.demos.shapes.detect import Detection, detect
from hookctl.demos.shapes.evaluate import generate
from hookctl.demos.shapes.hooks.collaboration import SIZES, caption_of, class_ids
from hookctl.demos.shapes.load import load_shapes
from hookctl.demos.shapes.world import Scene, sample_scene
from hookctl.learned import load
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator

SEED = 5 * 10**8  # of scenes that no training drew
BATCH = 8
# How far the mask leads early. Without it the mixture of the least error trusts it by 0.6 where
# objects find their places, and guidance, which it has not seen, then follows the text.
FACTOR = 100.0
Figures = dict[str, float]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one way drew of every scene.

    images: uint8 [scenes, 128, 128, 3]; influence: the mask's share at every step and place,
    [steps, scenes, 16, 16], of a collaboration of both.
    """

    images: NDArray[np.uint8]
    influence: Tensor | None


def collaboration(path: Path, pipe: Any, scenes: Sequence[Scene]) -> CollaborativeDiffusion:
    """The editor that a file is, told the masks of scenes."""
    masks = [class_ids(scene) for scene in scenes]
    edit = load(path, pipe, mask=masks, guided=True, **SIZES)
    assert isinstance(edit, CollaborativeDiffusion)
    return edit


def together(models: Sequence[Collaborator]) -> CollaborativeDiffusion:
    """The models mixed evenly, or as their dynamic diffusers and the official schedule say."""
    if any(one.influence is None for one in models):
        return CollaborativeDiffusion(models)
    return CollaborativeDiffusion(models, paper=True, factor=FACTOR)


def ways(edit: CollaborativeDiffusion) -> dict[str, list[Collaborator]]:
    """The collaboration, and what it is to be better than."""
    mask, text = edit.models
    even = [replace(one, influence=None) for one in (mask, text)]
    return {"text": [], "mask": even[:1], "mean": even, "collaboration": [mask, text]}


def draw(
    pipe: Any,
    models: Sequence[Collaborator],
    scenes: Sequence[Scene],
    steps: int,
    guidance: float,
    seed: int = 0,
) -> Drawn:
    """Every scene by some models, or by the pipeline alone; scene i from the noise of seed + i."""
    images, maps = [], []
    texts = [caption_of(scene) for scene in scenes]
    for i in range(0, len(scenes), BATCH):
        editors = [together(_of(models, i))] if models else []
        with hookctl.control(pipe, *editors) if editors else nullcontext():
            made, _ = generate(pipe, texts[i : i + BATCH], steps, guidance, seed + i)
        images.append(made)
        if len(models) > 1:
            maps.append(editors[0].influence["mask"].float().cpu())
    return Drawn(np.concatenate(images), torch.cat(maps, 1) if maps else None)


def measure(
    path: Path, count: int, *, steps: int = 25, guidance: float = 3.0, device: str | None = None
) -> dict[str, Figures]:
    """For each way: shares of objects with their colour, with their place and with both; for the
    collaboration also the mask's mean share in the first and in the last fifth of the steps."""
    pipe = load_shapes(device)
    rng = np.random.default_rng(SEED)
    scenes = [sample_scene(rng) for _ in range(count)]
    edit = collaboration(path, pipe, scenes)
    return {
        name: figures(draw(pipe, models, scenes, steps, guidance), scenes)
        for name, models in ways(edit).items()
    }


def _of(models: Sequence[Collaborator], first: int) -> list[Collaborator]:
    """The models with the conditions of one batch of images."""
    return [
        one
        if one.condition is None
        else replace(one, condition=one.condition[first : first + BATCH])
        for one in models
    ]


def figures(drawn: Drawn, scenes: Sequence[Scene]) -> Figures:
    """Shares of the objects that have their colour, their place, and both at once."""
    found = _figures([detect(image) for image in drawn.images], scenes)
    if drawn.influence is not None:
        by_step = drawn.influence.mean((1, 2, 3))
        few = max(1, len(by_step) // 5)
        found |= {
            "share early": round(float(by_step[:few].mean()), 3),
            "share late": round(float(by_step[-few:].mean()), 3),
        }
    return found


def _figures(found: Sequence[Detection], scenes: Sequence[Scene]) -> Figures:
    colours, places, both = 0, 0, 0
    things = [(d, thing) for d, s in zip(found, scenes, strict=True) for thing in s.things]
    for detection, thing in things:
        mask = thing.mask()
        every = (*detection.objects, *detection.extras)
        there = [one for one in every if _overlap(one.mask, mask) >= 0.5]
        colours += detection.find(thing.shape, thing.colour) is not None
        places += bool(there)
        both += any((o.shape, o.colour) == (thing.shape, thing.colour) for o in there)
    total = len(things)
    shares = {"colour": colours / total, "place": places / total, "both": both / total}
    return {name: round(share, 3) for name, share in shares.items()}


def _overlap(a: Any, b: Any) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m hookctl.demos.shapes.hooks.measure_collaboration"
    )
    parser.add_argument("weights", type=Path)
    parser.add_argument("--count", type=int, default=128, help="scenes")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    found = measure(options.weights, options.count, steps=options.steps, device=options.device)
    for name, one in found.items():
        print(name, " ".join(f"{k} {v:.3f}" for k, v in one.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
