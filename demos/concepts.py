"""Where an image shows what: the maps of ConceptAttention beside those of attention.

Both are read in the same runs of the flow-matching pipeline, whose images are judged by the
detector: maps of the nouns of right images against the pixels of their objects. Maps are enlarged
bilinearly to the image. IoU at mean: of the pixels above the map's mean, the threshold of the
paper's segmentations; IoU at best: at the threshold that suits the map best. `the mask itself` is
the object's mask in the maps' own cells, which no map need surpass.

ConceptAttention is asked twice: for the nouns alone at all sites and steps, as published, and in
the way that suits this model best, whose texts are sentences: for the phrases of the objects, at
one site, in the last steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import hookctl
from hookctl.address.families import denoiser_of
from hookctl.demos.cost import counted
from hookctl.demos.layouts import LayoutCase, draw_layout
from hookctl.demos.models import SHAPES_FLOW, call_of, opened
from hookctl.demos.placing import GUIDANCE, STEPS, Progress, words
from hookctl.demos.shapes.detect import Found, detect, matches
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.recipes import ConceptAttention

REST = "background"  # the concept of what is no object
SHOWN = 6
THRESHOLDS = 64  # that are tried between a map's least and its greatest value
CONCEPTS, SUITED = "ConceptAttention", "ConceptAttention, suited"
ATTENTION, LOOKED_AT = "attention maps", "attention maps, to the image"
TRUTH = "the mask itself"
KINDS = (CONCEPTS, SUITED, ATTENTION)  # that are shown

SITE, LATE = ["transformer_blocks.3.attn"], 0.6  # of the suited way: where, and from when on

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Drawn:
    """One image: kind of map -> noun -> map; right: whether it shows its prompt; its rows."""

    case: LayoutCase
    image: Image.Image
    maps: Mapping[str, Mapping[str, Tensor]]
    right: bool
    rows: int


def draw(pipe: Any, case: LayoutCase, seed: int) -> Drawn:
    """A case, and the maps of its nouns."""
    nouns = words([case])[0]
    concepts = ConceptAttention([*nouns, REST])
    phrases = [*case.phrases, f"a {case.background} {REST}"]
    suited = ConceptAttention(phrases, sites=SITE, start=LATE)
    readers = hookctl.Maps(*nouns, sites="joint"), hookctl.Maps(*nouns, to="image")
    editors = (concepts, suited, *readers)
    with hookctl.control(pipe, *editors) as session, counted(denoiser_of(pipe)) as cost:
        image = pipe(
            case.prompt,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            **call_of(pipe),
        ).images[0]
    by_phrase = dict(zip(nouns, suited.maps.values(), strict=False))  # the rest is left out
    maps = {
        CONCEPTS: {noun: concepts.maps[noun][0] for noun in nouns},
        SUITED: {noun: by_phrase[noun][0] for noun in nouns},
        ATTENTION: {noun: session.maps[noun].mean() for noun in nouns},
        LOOKED_AT: {noun: session.maps.word(noun, to="image").mean() for noun in nouns},
    }
    return Drawn(case, image, maps, matches(detect(image), case.prompt), cost.rows)


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    pipe, started = opened(SHAPES_FLOW), time.perf_counter()
    rng, drawn = np.random.default_rng([seed, 8]), []
    for i in range(seeds):
        drawn.append(draw(pipe, draw_layout(rng, 1 + i % 3), seed + i))
        if progress is not None:
            progress(i + 1, seeds)
    report = {
        "demo": "concepts",
        "model": SHAPES_FLOW,
        "seed": seed,
        "cases": seeds,
        "cases_with_right_image": sum(one.right for one in drawn),
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": judged([one for one in drawn if one.right]),
        "rows_per_image": float(np.mean([one.rows for one in drawn])),
        # Two of guidance, and one for each way in each of its steps.
        "rows_in_theory": 3 * STEPS + STEPS - round(LATE * STEPS),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    save_image(sheet(drawn), out / "grid.png")
    return report


# -- how far a map is an object's ------------------------------------------------------------------


def judged(drawn: list[Drawn]) -> dict[str, dict[str, float]]:
    """Kind of map -> mean figures over all objects of right images."""
    found: dict[str, list[dict[str, float]]] = {}
    for one in drawn:
        for thing in one.case.things:
            there = detect(one.image).find(thing.shape, thing.colour)
            assert there is not None  # the image is right
            kinds = {kind: maps[thing.shape] for kind, maps in one.maps.items()}
            cells = kinds[CONCEPTS].shape
            for kind, map in {**kinds, TRUTH: in_cells(there.mask, *cells)}.items():
                found.setdefault(kind, []).append(agreement(map, there))
    return {
        kind: {
            "objects": len(each),
            **{what: round(float(np.mean([f[what] for f in each])), 3) for what in each[0]},
        }
        for kind, each in found.items()
    }


def agreement(map: Tensor, there: Found) -> dict[str, float]:
    """Of a map [h, w] with an object's mask, after enlarging."""
    height, width = there.mask.shape
    large = F.interpolate(
        map.double()[None, None], (height, width), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    levels = np.linspace(large.min(), large.max(), THRESHOLDS + 2)[1:-1]
    return {
        "iou_at_mean": overlap(large > large.mean(), there.mask),
        "iou_at_best": max(overlap(large > level, there.mask) for level in levels),
    }


def overlap(a: Mask, b: Mask) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def in_cells(mask: Mask, rows: int, columns: int) -> Tensor:
    """How much of each cell a mask covers, [rows, columns]."""
    return F.adaptive_avg_pool2d(torch.from_numpy(mask).double()[None], (rows, columns))[0]


def sheet(drawn: list[Drawn]) -> Image.Image:
    """Images with the maps of their first nouns by each way, right ones first."""
    some = sorted(drawn, key=lambda one: not one.right)[:SHOWN]
    rows = []
    for one in some:
        nouns = words([one.case])[0][:2]
        over = [
            show.overlay(one.image, one.maps[kind][noun], label=noun)
            for noun in nouns
            for kind in KINDS
        ]
        rows.append([one.image, *over, *[None] * (2 * len(KINDS) - len(over))])
    titles = ["image", *KINDS, *KINDS]
    prompts = [one.case.prompt for one in some]
    return show.grid(rows, column_titles=titles, row_titles=prompts, cell=(140, 140))
