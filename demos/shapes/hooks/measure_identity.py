"""Measures a trained identity: hue and bars read off a reference picture, and drawn anew.

    python -m hookctl.demos.shapes.hooks.measure_identity out/hooks/identity.safetensors

Looks and pictures were never trained on, and prompts say no colour (or, where it is said so, any).
Every way is drawn from the same noises; figures are read off the images without the encoder, apart
from the cosines. With IdentityNet (`--net FOLDER`) the place is asked for too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl.demos.shapes.evaluate import generate
from hookctl.demos.shapes.hooks.identity_encoder import LENGTH, embedding_of, load_encoder
from hookctl.demos.shapes.hooks.identity_net import FOLDER, points_of
from hookctl.demos.shapes.hooks.looks import (
    Look,
    Seen,
    hue_apart,
    read_look,
    render_looks,
    sample_look,
    say,
)
from hookctl.demos.shapes.load import load_shapes
from hookctl.demos.shapes.render import to_uint8
from hookctl.demos.shapes.world import COLOUR_NAMES, Scene, sample_scene
from hookctl.learned import Person, load

SEED = 7 * 10**8  # of looks and scenes that no training drew
BATCH = 8
NEAR = 20.0  # degrees
SCALE = 1.0  # of the tokens and of what IdentityNet adds, as in training
Figures = dict[str, float]


class Cases:
    """What is to be drawn: scenes of one object, its look, and a reference picture of that.

    Not on gray, where the plain model draws noise for some prompts that say no colour.
    """

    def __init__(self, count: int, seed: int = SEED) -> None:
        rng = np.random.default_rng(seed)
        drawn = iter(lambda: sample_scene(rng, 1), None)
        self.scenes = list(islice((s for s in drawn if s.background != "gray"), count))
        self.looks = [sample_look(rng) for _ in range(count)]
        shown = [sample_scene(rng, 1) for _ in range(count)]
        pixels = to_uint8(render_looks(shown, [[look] for look in self.looks]))
        self.references = [Image.fromarray(one) for one in pixels]
        encoder = load_encoder()
        self.embeddings = torch.stack([embedding_of(one, encoder) for one in self.references])
        self.colours = [str(rng.choice(COLOUR_NAMES)) for _ in range(count)]

    def prompts(self, coloured: bool = False) -> list[str]:
        said = self.colours if coloured else [None] * len(self.scenes)
        return [
            f"{say(scene.things[0], colour)} on a {scene.background} background"
            for scene, colour in zip(self.scenes, said, strict=True)
        ]

    def people(self, *, placed: bool = False, known: bool = True) -> list[list[Person]]:
        """One person for each prompt; placed: with the points of the object; known: with the look,
        else with the embedding of nothing."""
        return [
            [Person(e if known else 0 * e, points_of(scene.things[0]) if placed else None)]
            for e, scene in zip(self.embeddings, self.scenes, strict=True)
        ]


Way = tuple[list[str], list[list[Person]] | None]  # prompts, and whom each shows


def ways_of(cases: Cases, net: Path | None) -> dict[str, Way]:
    """How the cases are drawn: by the "text" alone; with the tokens of the "look"; with those while
    the text says "any colour". With a net also at a place: "look and place" and, with the embedding
    of nothing, "place"."""
    plain, own = cases.prompts(), cases.people()
    ways: dict[str, Way] = {
        "text": (plain, None),
        "look": (plain, own),
        "look, any colour": (cases.prompts(coloured=True), own),
    }
    if net is not None:
        ways["look and place"] = plain, cases.people(placed=True)
        ways["place"] = plain, cases.people(placed=True, known=False)
    return ways


def draw(
    pipe: Any,
    path: Path,
    way: Way,
    net: Path | None,
    *,
    steps: int = 25,
    guidance: float = 3.0,
    seed: int = 0,
) -> list[Image.Image]:
    """The images of a way, case i from the noise of seed + i; net: IdentityNet's folder."""
    texts, shown = way
    made: list[Image.Image] = []
    for i in range(0, len(texts), BATCH):
        edits = []
        if shown is not None:
            options = {"scale": SCALE, "control_scale": SCALE, "identity_net": net}
            edits = [load(path, pipe, people=shown[i : i + BATCH], **options)]
        with hookctl.control(pipe, *edits) if edits else nullcontext():
            images, _ = generate(pipe, texts[i : i + BATCH], steps, guidance, seed + i)
        made += [Image.fromarray(image) for image in images]
    return made


def measure(
    path: Path,
    count: int,
    *,
    net: Path | None = None,
    steps: int = 25,
    guidance: float = 3.0,
    device: str | None = None,
    ways: Sequence[str] | None = None,
) -> dict[str, Figures]:
    """The figures of each way (`ways_of`), or of some; path: of the adapter; net: of the folder."""
    pipe, cases = load_shapes(device), Cases(count)
    figures = {}
    for name, way in ways_of(cases, net).items():
        if ways is None or name in ways:
            used = net if "place" in name else None
            made = draw(pipe, path, way, used, steps=steps, guidance=guidance)
            figures[name] = figures_of(made, cases)
    return figures


def figures_of(made: Sequence[Image.Image], cases: Cases) -> Figures:
    """What images show of their references (and, as "other", of another case's reference).

    found: share in which there is an object; shape: share that have the prompt's; hue: mean error
    in degrees (chance: 90), near: share within 20 degrees (chance: 0.11); depth: mean error of the
    bars' depth (chance: a third of the deepest, 0.23); cosine: of the embeddings; iou: mean
    overlap of the object's box with its scene's; apart: mean distance of their middles in px.
    """
    seen = [read_look(image) for image in made]
    there = [i for i, one in enumerate(seen) if one is not None]
    if not there:
        return {"found": 0.0}
    other = {i: (i + 1) % len(made) for i in there}
    encoder = load_encoder()
    embeddings = torch.stack([embedding_of(image, encoder) for image in made])
    near: Any = embeddings @ cases.embeddings.T / LENGTH**2
    own = {i: i for i in there}
    found: dict[str, float] = {
        "found": len(there) / len(made),
        "shape": _mean(_shape(seen[i], cases.scenes[i]) for i in there),
        **_looks(seen, cases.looks, own, ""),
        "cosine": _mean(float(near[i, i]) for i in there),
        **_looks(seen, cases.looks, other, "other's "),
        "other's cosine": _mean(float(near[i, other[i]]) for i in there),
        "iou": _mean(_overlap(seen[i], cases.scenes[i]) for i in there),
        "apart": _mean(_apart(seen[i], cases.scenes[i]) for i in there),
    }
    return {name: round(value, 3) for name, value in found.items()}


def _looks(
    seen: Sequence[Seen | None], looks: Sequence[Look], pairs: Mapping[int, int], whose: str
) -> Figures:
    hues, depths = [], []
    for i, j in pairs.items():
        one = seen[i]
        assert one is not None  # only those that were found
        hues.append(hue_apart(one.look, looks[j]))
        depths.append(abs(one.look.depth - looks[j].depth))
    return {
        f"{whose}hue": float(np.mean(hues)),
        f"{whose}near": float(np.mean(np.array(hues) <= NEAR)),
        f"{whose}depth": float(np.mean(depths)),
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _shape(seen: Seen | None, scene: Scene) -> bool:
    return seen is not None and seen.found.shape == scene.things[0].shape


def _overlap(seen: Seen | None, scene: Scene) -> float:
    assert seen is not None
    a, b = seen.found.box, scene.things[0].box
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def _apart(seen: Seen | None, scene: Scene) -> float:
    assert seen is not None
    middles = [np.add(box[:2], box[2:]) / 2 for box in (seen.found.box, scene.things[0].box)]
    return float(np.linalg.norm(middles[0] - middles[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m hookctl.demos.shapes.hooks.measure_identity")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--net", type=Path, help=f"folder of IdentityNet, such as {FOLDER.name}")
    parser.add_argument("--count", type=int, default=64, help="looks")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--device", default=None)
    parser.add_argument("--ways", nargs="+", help="(default: all)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    figures = measure(
        options.weights, options.count, net=options.net, steps=options.steps,
        device=options.device, ways=options.ways,
    )  # fmt: skip
    for name, one in figures.items():
        print(name, " ".join(f"{k} {v:.3f}" for k, v in one.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
