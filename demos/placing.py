"""What the demos of objects and their places share: drawing a set of cases by a method, and looking
at where things are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl import Editor
from hookctl.address.families import denoiser_of
from hookctl.address.regions import Region
from hookctl.demos.cost import counted, drawing_mib
from hookctl.demos.layouts import LayoutCase, found_in_place, overlap
from hookctl.demos.models import call_of, opened
from hookctl.demos.shapes.detect import Found, detect
from hookctl.demos.shapes.world import COLOURS, IMAGE_SIZE, Thing
from hookctl.inspect import show
from hookctl.inspect.files import save_image, write_json
from hookctl.maps import MapStore

STEPS, GUIDANCE, BATCH = 25, 3.0, 16
IN_PLACE = 0.3  # intersection over union from which on an object hits its box
GUIDED = range(STEPS // 5, 2 * STEPS // 5)  # steps in which every guidance is at work
AFTER = range(STEPS // 2, STEPS)
SHOWN = 6

Progress = Callable[[int, int], None]
Stack = Callable[[Sequence[LayoutCase]], list[Editor]]


@dataclass(eq=False)
class Drawn:
    """What a method drew: the images, what the attention of nouns was, and the cost."""

    images: list[Image.Image]
    guided: list[float]  # shares in each box, while guidance lasts
    shares: list[float]  # in the second half of the run
    weakest: list[float]  # peaks of the least attended noun of each image, while guidance lasts
    rows: float  # that the denoiser evaluated, for each image, partial calls included
    partial: float  # of them those of calls that energies made


def words(cases: Sequence[LayoutCase]) -> list[list[str]]:
    """The noun of each object: it carries the object in the embedded model."""
    return [[thing.shape for thing in case.things] for case in cases]


def boxes(cases: Sequence[LayoutCase]) -> list[list[Any]]:
    return [list(case.boxes) for case in cases]


def draw(
    pipe: Any, cases: Sequence[LayoutCase], stack: Stack, seed: int, *, read: bool = True
) -> Drawn:
    """Every case once; case i starts from the noise of seed + i.

    read: the attention of the nouns too, which the prompts must name then.
    """
    made, guided, shares, weakest, partial = [], [], [], [], 0
    with counted(denoiser_of(pipe)) as cost:
        for i in range(0, len(cases), BATCH):
            some, editors = cases[i : i + BATCH], stack(cases[i : i + BATCH])
            nouns = sorted({word for one in words(some) for word in one})
            reading = [hookctl.Maps(*nouns, sites="cross @1, joint")] if read else []
            with hookctl.control(pipe, *editors, *reading) as session:
                made += pipe(
                    [case.prompt for case in some],
                    num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE,
                    generator=[
                        torch.Generator().manual_seed(seed + i + j) for j in range(len(some))
                    ],
                    **call_of(pipe),
                ).images
            if read:
                guided += in_box(session.maps, some, GUIDED)
                shares += in_box(session.maps, some, AFTER)
                weakest += least_peaks(session.maps, some, GUIDED)
            partial += len(some) * sum(len(calls_of(editor)) for editor in editors)
    rows = cost.rows / len(cases)
    return Drawn(made, guided, shares, weakest, rows, partial / len(cases))


def calls_of(editor: Any) -> Sequence[Any]:
    """The energies that an editor asked for, its layout model's included."""
    inner = getattr(getattr(editor, "layout", None), "guidance", None)
    return [*getattr(editor, "record", ()), *getattr(inner, "record", ())]


def in_box(maps: MapStore, cases: Sequence[LayoutCase], steps: Sequence[int]) -> list[float]:
    """The share of each noun's attention that lies in the cells of its box, as energies count it,
    at the sites that they read."""
    shares = []
    for p, case in enumerate(cases):
        for thing, box in zip(case.things, case.boxes, strict=True):
            mean = maps[thing.shape].where(prompt=p, steps=steps).mean().detach()
            inside = Region.box(*box).tokens(*mean.shape).view_as(mean)
            shares.append(float(mean[inside].sum() / mean.sum()))
    return shares


def least_peaks(maps: MapStore, cases: Sequence[LayoutCase], steps: Sequence[int]) -> list[float]:
    """Of each image, the most attention that any place gives to the noun that gets least: what
    Attend-and-Excite raises."""

    def peak(word: str, p: int) -> float:
        return float(maps[word].where(prompt=p, steps=steps).mean().max())

    return [min(peak(thing.shape, p) for thing in case.things) for p, case in enumerate(cases)]


# -- what became of the objects --------------------------------------------------------------------


def in_boxes(cases: Sequence[LayoutCase], drawn: Drawn) -> dict[str, float]:
    """How far the attention and the objects are in their boxes."""
    return {
        "share_while_guided": round(float(np.mean(drawn.guided)), 3),
        "share_in_box": round(float(np.mean(drawn.shares)), 3),
        **placed(cases, drawn.images),
    }


def attended(drawn: Drawn) -> dict[str, float]:
    """How much attention the least attended noun of an image gets at its best place."""
    return {"weakest_noun": round(float(np.mean(drawn.weakest)), 3)}


def placed(cases: Sequence[LayoutCase], images: Sequence[Image.Image]) -> dict[str, float]:
    """hits: share of the objects in their box; box_iou: mean overlap, 0 for those not found."""
    ious = []
    for case, drawn in zip(cases, images, strict=True):
        for found, box in zip(found_in_place(detect(drawn), case), case.boxes, strict=True):
            ious.append(overlap(found, box) if found is not None else 0.0)
    hits = float(np.mean([iou >= IN_PLACE for iou in ious]))
    return {"hits": round(hits, 3), "box_iou": round(float(np.mean(ious)), 3)}


def named(cases: Sequence[LayoutCase], images: Sequence[Image.Image]) -> dict[str, float]:
    """missing: share of the objects that are nowhere; attributes: share that have their pattern
    and size too; whole: images where no object is missing; surplus: objects and blobs beyond
    those asked for."""
    there, right, whole, surplus = [], [], [], []
    for case, drawn in zip(cases, images, strict=True):
        detection = detect(drawn)
        found = [detection.find(thing.shape, thing.colour) for thing in case.things]
        there += [one is not None for one in found]
        whole.append(all(one is not None for one in found))
        right += [_fits(one, thing) for one, thing in zip(found, case.things, strict=True)]
        surplus.append(len(detection.objects) + len(detection.extras) - len(case.things))
    return {
        "missing": round(1 - float(np.mean(there)), 3),
        "attributes": round(float(np.mean(right)), 3),
        "whole": round(float(np.mean(whole)), 3),
        "surplus": round(float(np.mean(surplus)), 2),
    }


def _fits(found: Found | None, thing: Thing) -> bool:
    return found is not None and (found.pattern, found.size) == (thing.pattern, thing.size)


# -- the report ------------------------------------------------------------------------------------


def compare(
    demo: str,
    out: Path,
    cases: Sequence[LayoutCase],
    methods: Mapping[str, Stack],
    seed: int,
    progress: Progress | None,
    boxed: bool = True,
    model: str = "shapes",
) -> dict[str, Any]:
    """Draw all cases by every method with the same noise; writes grid.png and report.json.

    boxed: whether the methods know the boxes; without, boxes are neither measured nor shown, but
    the attention that the least attended noun gets is."""
    pipe, started = opened(model), time.perf_counter()
    drawn: dict[str, Drawn] = {}
    for done, (name, stack) in enumerate(methods.items(), 1):
        drawn[name] = draw(pipe, cases, stack, seed)
        if progress is not None:
            progress(done, len(methods))
    figures = {
        name: (in_boxes(cases, one) if boxed else attended(one)) | named(cases, one.images)
        for name, one in drawn.items()
    }
    costs = {name: cost_of(one, theory(name)) for name, one in drawn.items()}
    for name, cost in costs.items():
        cost["peak_mib_of_an_image"] = peak(pipe, cases[0], methods[name])
    report = write_up(demo, out, seed, len(cases), figures, costs, started, model)
    sheet(out, cases, {name: one.images for name, one in drawn.items()}, layout if boxed else None)
    return report


def cost_of(drawn: Drawn, whole: float) -> dict[str, float]:
    """Rows of an image, beside those that theory wants; whole: of whole calls."""
    return {
        "rows_per_image": round(drawn.rows, 1),
        "of_them_partial": round(drawn.partial, 1),
        "rows_in_theory": round(whole + drawn.partial, 1),
    }


def peak(pipe: Any, case: LayoutCase, stack: Stack) -> float:
    """Most live memory while one image is drawn, MiB."""
    return drawing_mib(pipe, case.prompt, *stack([case]), guidance=GUIDANCE, **call_of(pipe))


def write_up(
    demo: str,
    out: Path,
    seed: int,
    cases: int,
    figures: Mapping[str, Any],
    costs: Mapping[str, Any],
    started: float,
    model: str = "shapes",
) -> dict[str, Any]:
    """Write report.json, and return it."""
    report = {
        "demo": demo,
        "model": model,
        "seed": seed,
        "cases": cases,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "methods": dict(figures),
        "cost": dict(costs),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    return report


def sheet(
    out: Path,
    cases: Sequence[LayoutCase],
    images: Mapping[str, Sequence[Image.Image]],
    picture: Callable[[LayoutCase], Image.Image] | None,
) -> None:
    """Write grid.png: what is asked for (picture), then every method, a case a row."""
    rows = [
        [*([picture(case)] if picture else []), *(made[i] for made in images.values())]
        for i, case in enumerate(cases[:SHOWN])
    ]
    grid = show.grid(
        rows,
        column_titles=[*(["layout"] if picture else []), *images],
        row_titles=[case.prompt for case in cases[:SHOWN]],
        cell=(140, 140),
    )
    save_image(grid, out / "grid.png")


def theory(name: str) -> float:
    """Rows of whole denoiser calls for an image: two a step for each model."""
    return 2.0 * STEPS * (2 if name == "RealCompo" else 1)


def layout(case: LayoutCase) -> Image.Image:
    """The boxes of a scene in their objects' colours."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 235, np.uint8)
    for thing in case.things:
        x0, y0, x1, y1 = (int(side) for side in thing.box)
        canvas[y0:y1, x0:x1] = COLOURS[thing.colour]
    return Image.fromarray(canvas)
