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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hookctl
from hookctl.demos.shapes.captions import describe
from hookctl.demos.shapes.detect import Detection, detect
from hookctl.demos.shapes.evaluate import generate
from hookctl.demos.shapes.hooks.collaboration import SIZES, class_ids
from hookctl.demos.shapes.load import load_shapes
from hookctl.demos.shapes.world import Scene, sample_scene
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator, from_checkpoint
from hookctl.learned.loading import open_source

SEED = 5 * 10**8  # of scenes that no training drew
BATCH = 8
Figures = dict[str, float]


def ways(edit: CollaborativeDiffusion) -> dict[str, list[Collaborator]]:
    """The collaboration, and what it is to be better than."""
    mask, text = edit.models
    even = [replace(one, influence=None) for one in (mask, text)]
    return {"text": [], "mask": even[:1], "mean": even, "collaboration": [mask, text]}


def measure(
    path: Path, count: int, *, steps: int = 25, guidance: float = 3.0, device: str | None = None
) -> dict[str, Figures]:
    """For each way: shares of objects with their colour, with their place and with both; for the
    collaboration also the mask's mean share in the first and in the last fifth of the steps."""
    pipe = load_shapes(device)
    rng = np.random.default_rng(SEED)
    scenes = [sample_scene(rng) for _ in range(count)]
    texts = [_caption(scene) for scene in scenes]
    masks = [class_ids(scene) for scene in scenes]
    checkpoint = open_source(path, pipe).checkpoint
    options: dict[str, Any] = {"mask": masks, "guided": True, **SIZES}
    edit = from_checkpoint(checkpoint, pipe, **options)
    figures = {}
    for name, models in ways(edit).items():
        found: list[Detection] = []
        shares: list[torch.Tensor] = []
        for i in range(0, count, BATCH):
            editors = [CollaborativeDiffusion(_of(models, i))] if models else []
            with hookctl.control(pipe, *editors) if editors else nullcontext():
                images, _ = generate(pipe, texts[i : i + BATCH], steps, guidance, seed=i)
            found += [detect(image) for image in images]
            if len(models) > 1:
                shares.append(editors[0].influence["mask"].mean((1, 2, 3)).cpu())
        figures[name] = _figures(found, scenes)
        if shares:
            by_step = torch.stack(shares).mean(0)
            few = max(1, len(by_step) // 5)
            figures[name] |= {
                "share early": round(float(by_step[:few].mean()), 3),
                "share late": round(float(by_step[-few:].mean()), 3),
            }
    return figures


def _caption(scene: Scene) -> str:
    return " and ".join(describe(thing) for thing in scene.things)


def _of(models: Sequence[Collaborator], first: int) -> list[Collaborator]:
    """The models with the conditions of one batch of images."""
    return [
        one
        if one.condition is None
        else replace(one, condition=one.condition[first : first + BATCH])
        for one in models
    ]


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
    return {"colour": colours / total, "place": places / total, "both": both / total}


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
    figures = measure(options.weights, options.count, steps=options.steps, device=options.device)
    for name, one in figures.items():
        print(name, " ".join(f"{k} {v:.3f}" for k, v in one.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
