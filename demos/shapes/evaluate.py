"""Measures the embedded pipeline on sentences it was never trained on.

    python -m hookctl.demos.shapes.evaluate --prompts 256 --json figures.json

Strict success means that every object is there with its colour and shape and that nothing else is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .captions import parse, sample
from .detect import Detection, detect, matches, wanted_pairs
from .load import load_shapes, load_shapes_flow
from .render import render, to_uint8
from .world import Scene, sample_scene

Figures = dict[str, float]


def held_out_prompts(count: int, seed: int) -> list[str]:
    """`count` held-out captions, a third each of one, two and three objects; only the one-object
    ones, of which there are few, may come twice."""
    rng = np.random.default_rng(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        objects = 1 + len(prompts) % 3
        text = sample(rng, objects, held_out=True)[1]
        if objects == 1 or text not in prompts:
            prompts.append(text)
    return prompts


def reads_all(detection: Detection, scene: Scene) -> bool:
    """Whether every attribute of every object and the background were read right."""
    found = Counter((o.shape, o.colour, o.pattern, o.size) for o in detection.objects)
    true = Counter((t.shape, t.colour, t.pattern, t.size) for t in scene.things)
    return found == true and not detection.extras and detection.background == scene.background


def measure_detector(count: int, seed: int) -> Figures:
    """The detector on `count` ground-truth renderings."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    found = [detect(p) for p in to_uint8(render(scenes))]
    right = [matches(d, s) for d, s in zip(found, scenes, strict=True)]
    every = [reads_all(d, s) for d, s in zip(found, scenes, strict=True)]
    return {"colour and shape": float(np.mean(right)), "all attributes": float(np.mean(every))}


@torch.no_grad()
def measure_vae(pipe: StableDiffusionPipeline, count: int, seed: int) -> Figures:
    """`count` renderings through encoder and decoder: PSNR in dB, and what the detector reads."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    error, right, every = 0.0, 0, 0
    for i in range(0, count, 16):
        true = render(scenes[i : i + 16], pipe.device).to(pipe.vae.dtype)
        made = pipe.vae.decode(pipe.vae.encode(true).latent_dist.mode()).sample.clamp(-1, 1)
        error += float((made - true).float().square().mean((1, 2, 3)).sum())
        found = [detect(p) for p in to_uint8(made)]
        right += sum(matches(d, s) for d, s in zip(found, scenes[i : i + 16], strict=True))
        every += sum(reads_all(d, s) for d, s in zip(found, scenes[i : i + 16], strict=True))
    psnr = 10.0 * float(np.log10(4.0 * count / error))
    return {"psnr": psnr, "colour and shape": right / count, "all attributes": every / count}


def generate(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    steps: int,
    guidance: float,
    seed: int = 0,
    batch: int = 8,
) -> tuple[NDArray[np.uint8], float]:
    """Images [prompts, 128, 128, 3], uint8, prompt i from seed + i; and seconds per image."""
    made: list[NDArray[np.uint8]] = []
    began = time.perf_counter()
    starts, one = range(0, len(prompts), batch), len(prompts) <= batch
    for i in tqdm(starts, desc=f"guidance {guidance:g}", leave=False, disable=one):
        part = prompts[i : i + batch]
        seeds = [torch.Generator("cpu").manual_seed(seed + i + k) for k in range(len(part))]
        out = pipe(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=seeds,
            output_type="np",
        ).images  # fmt: skip
        made.append((out * 255).round().astype(np.uint8))
    return np.concatenate(made), (time.perf_counter() - began) / len(prompts)


def relation_holds(detection: Detection, text: str) -> bool | None:
    """Whether the first said relation holds between its two objects; None if unsaid or unseen."""
    request = parse(text)
    for (a, b), said in zip(
        zip(request.mentions, request.mentions[1:], strict=False), request.relations[1:],
        strict=True,
    ):  # fmt: skip
        first, second = detection.find(a.shape, a.colour), detection.find(b.shape, b.colour)
        if said is None or first is None or second is None:
            continue
        axis = 0 if said in ("left of", "right of") else 1
        sign = 1.0 if said in ("left of", "above") else -1.0
        return sign * (second.centre[axis] - first.centre[axis]) > 0
    return None


def measure_prompts(prompts: list[str], images: NDArray[np.uint8]) -> Figures:
    """Strict success by number of objects, recalls, relations, and chance (the same images
    against the next prompt with as many objects)."""
    found = [detect(p) for p in images]
    counts = np.array([len(parse(p).mentions) for p in prompts])
    strict = np.array([matches(d, p) for d, p in zip(found, prompts, strict=True)])
    chance = []
    for n in (1, 2, 3):
        at = np.nonzero(counts == n)[0]
        chance += [matches(found[i], prompts[j]) for i, j in zip(at, np.roll(at, 1), strict=True)]
    wanted = [wanted_pairs(p) for p in prompts]
    hit = sum((d.pairs & w).total() for d, w in zip(found, wanted, strict=True))
    number = [len(d.objects) + len(d.extras) for d in found]
    backgrounds = [
        d.background == r.background
        for d, r in zip(found, map(parse, prompts), strict=True)
        if r.background is not None
    ]
    striped, sized = [], []
    for d, p in zip(found, prompts, strict=True):
        for m in parse(p).mentions:
            o = d.find(m.shape, m.colour)
            if o is not None:
                striped.append(o.pattern == m.pattern)
                sized.append(o.size == m.size)
    related = [
        r for d, p in zip(found, prompts, strict=True) if (r := relation_holds(d, p)) is not None
    ]
    figures = {f"strict, {n} object{'s' * (n > 1)}": strict[counts == n] for n in (1, 2, 3)}
    figures |= {"strict, 1-2 objects": strict[counts < 3], "strict, all": strict}
    figures |= {
        "strict, shuffled prompts": chance, "right number": np.array(number) == counts,
        "background, where said": backgrounds, "pattern of found objects": striped,
        "size of found objects": sized, "relation of found objects": related,
    }  # fmt: skip
    means = {k: float(np.mean(v)) if len(v) else float("nan") for k, v in figures.items()}
    return means | {"objects found": hit / sum(w.total() for w in wanted)}


def grid(images: NDArray[np.uint8], columns: int = 8) -> Image.Image:
    """Images [n, h, w, 3] in rows."""
    rows = -(-len(images) // columns)
    n, h, w, _ = images.shape
    sheet = np.full((rows * columns, h, w, 3), 200, np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(sheet.reshape(rows * h, columns * w, 3))


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", type=Path, help="another folder than the embedded one")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.5])
    parser.add_argument("--flow", action="store_true", help="the flow-matching sibling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--grid", type=Path, help="write the first 64 images here (PNG)")
    options = parser.parse_args()
    load = load_shapes_flow if options.flow else load_shapes
    pipe = load(device=options.device, weights=options.weights)
    report: dict[str, Figures] = {
        "detector on renderings": measure_detector(300, options.seed + 1),
        "autoencoder": measure_vae(pipe, 128, options.seed + 2),
    }
    prompts = held_out_prompts(options.prompts, options.seed)
    generate(pipe, prompts[:1], 2, 7.5)  # warm up
    for g in options.guidance:
        images, seconds = generate(pipe, prompts, options.steps, g, options.seed, options.batch)
        name = f"{len(prompts)} held-out prompts, {options.steps} steps, guidance {g:g}"
        report[name] = measure_prompts(prompts, images) | {"seconds per image": seconds}
        if options.grid:
            grid(images[:64]).save(options.grid.with_stem(f"{options.grid.stem}-{g:g}"))
    for title, figures in report.items():
        print(f"\n{title}")
        for key, value in figures.items():
            print(f"  {key:36s} {value:8.3f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
