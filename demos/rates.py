"""How often every preset does what its method is for.

    python -m hookctl.demos.rates --seeds 32
    python -m hookctl.demos.rates box_diff masactrl --seeds 4 --images out/rates

Each preset is drawn at its own settings from the noises of seeds 0, 1, ... The cases that count are
those of which the plain model draws the first prompt right, as the detector reads it; among them
the preset's images are judged by `demos.judges`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file

import hookctl
from hookctl import Editor, recipes
from hookctl.demos.judges import JUDGES, Drawn, plain_right
from hookctl.demos.models import SHAPES, call_of, opened
from hookctl.demos.shapes.render import drawn as rendered
from hookctl.demos.shapes.world import Scene, Thing
from hookctl.demos.stacked_edits import striping
from hookctl.inspect import markdown_table
from hookctl.inspect.files import save_image, write_json
from hookctl.learned import load
from hookctl.preset import Preset, load_preset

PRESETS = Path(__file__).parent / "presets"
BATCH = 8  # seeds drawn at once
# What the presets are given that draw an image from another one of no seed.
STAR = Scene((Thing("star", "red", "striped"),), "gray")
GROWN = {"CyclicOneWay": "gray", "SelectiveOneWay": "white"}  # background of the given image


class Rate(NamedTuple):
    """Of so many seeds, in how many the plain model is right, and in how many of these the
    preset; seconds for all."""

    seeds: int
    plain: int
    edited: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.edited / max(self.plain, 1)


def read(name: str) -> Preset:
    """A preset that comes along."""
    known = {recipe: getattr(recipes, recipe) for recipe in recipes.__all__}
    return load_preset(PRESETS / f"{name}.toml", known, known, known)


class Presets:
    """Draws presets by the embedded pipelines, of which one may be given; plain images are kept,
    for many share their prompt."""

    def __init__(self, pipe: Any = None) -> None:
        self._pipes = {} if pipe is None else {SHAPES: pipe}
        self._plain: dict[tuple[Any, ...], Image.Image] = {}

    def draw(self, name: str, seeds: Sequence[int]) -> list[Drawn]:
        """What each seed draws."""
        preset = read(name)
        self.pipe = self._pipe(preset.model or SHAPES)
        found: list[Drawn] = []
        with ExitStack() as stack:
            for lora in preset.loras:
                stack.enter_context(striping(self.pipe, load_file(lora.path)))
            for i in range(0, len(seeds), BATCH):
                found += self._batch(preset, seeds[i : i + BATCH])
        return found

    def _pipe(self, model: str) -> Any:
        if model not in self._pipes:
            self._pipes[model] = opened(model)
        return self._pipes[model]

    def _batch(self, preset: Preset, seeds: Sequence[int]) -> list[Drawn]:
        run = preset.run
        edits = run.get("edit") or []
        prompts = [run["prompt"], *([edits] if isinstance(edits, str) else edits)]
        if preset.program is not None and preset.program.recipe in GROWN:
            return self._grown(preset, prompts, seeds)
        if preset.program is not None:
            return self._changed(preset, prompts, seeds)
        plain = self.plain(preset, prompts[0], seeds)
        if preset.inversion is not None:
            return self._inverted(preset, prompts, plain)
        image = rendered([STAR])[0] if preset.takes_image else None
        editors = [*self._hooks(preset), *preset.editors(prompts, image)]
        with hookctl.control(self.pipe, *editors):
            images = self._call(preset, prompts, seeds)
        n = len(seeds)
        striped = bool(preset.loras)
        return [Drawn(prompts, plain[j], images[j::n], None, striped) for j in range(n)]

    def _hooks(self, preset: Preset) -> list[Editor]:
        """The learned weights of a preset, which say all that they are given."""
        found = []
        for hook in preset.hooks:
            strength = {} if hook.strength is None else {"strength": hook.strength}
            found.append(load(hook.path, self.pipe, **hook.arguments, **strength))
        return found

    def _call(self, preset: Preset, prompts: list[str], seeds: Sequence[int]) -> list[Image.Image]:
        """The images of one call, prompt by prompt."""
        run = preset.run
        size = {side: run[side] for side in ("height", "width") if side in run}
        noises = [torch.Generator().manual_seed(seed) for _ in prompts for seed in seeds]
        images: list[Image.Image] = self.pipe(
            prompts,
            num_inference_steps=run["steps"],
            guidance_scale=run["guidance"],
            num_images_per_prompt=len(seeds),
            generator=noises,
            **size,
            **call_of(self.pipe),
        ).images
        return images

    def plain(self, preset: Preset, prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
        """A prompt without the preset, by an image of the model's own size."""
        run = {key: preset.run[key] for key in ("steps", "guidance")}
        loras = tuple(lora.path for lora in preset.loras)
        keys = [(id(self.pipe), prompt, *run.values(), loras, seed) for seed in seeds]
        if any(key not in self._plain for key in keys):
            images = self._call(Preset((), run), [prompt], seeds)
            self._plain |= dict(zip(keys, images, strict=True))
        return [self._plain[key] for key in keys]

    def _inverted(
        self, preset: Preset, prompts: list[str], images: list[Image.Image]
    ) -> list[Drawn]:
        """The images that the plain model drew, inverted and edited."""
        assert preset.inversion is not None
        texts: Any = [prompts[0]] * len(images)  # inversions take as many as there are images
        spec = preset.inversion
        inverted = spec.make(self.pipe, images, texts, steps=preset.run["steps"]).run()
        given = {"prompts": prompts, "guidance": preset.run["guidance"]}
        return [
            Drawn(prompts, image, one.edit(self.pipe, *preset.editors(prompts), **given), image)
            for one, image in zip(inverted, images, strict=True)
        ]

    def _changed(self, preset: Preset, prompts: list[str], seeds: Sequence[int]) -> list[Drawn]:
        """Images of the source, which is a red circle if there is but one prompt, changed to what
        the last prompt says."""
        assert preset.program is not None
        program, run = preset.program, {key: preset.run[key] for key in ("steps", "guidance")}
        if len(prompts) == 1:
            prompts = ["a red circle on a white background", *prompts]
        asked = prompts if program.takes_prompts else prompts[-1]
        made = []
        for seed, image in zip(seeds, self.plain(preset, prompts[0], seeds), strict=True):
            images = program.make(self.pipe, image, asked, seed=seed, **run).run()
            images = images if program.takes_prompts else [image, *images]
            made.append(Drawn(prompts, image, images, image))
        return made

    def _grown(self, preset: Preset, prompts: list[str], seeds: Sequence[int]) -> list[Drawn]:
        """Scenes grown round the middle of an image of a red circle."""
        assert preset.program is not None
        (whole,) = rendered([Scene((Thing("circle", "red"),), GROWN[preset.program.recipe])])
        image = whole.crop((32, 32, 96, 96))
        plain = self.plain(preset, prompts[0], seeds)
        run = {key: preset.run[key] for key in ("steps", "guidance")}
        made = []
        for seed, one in zip(seeds, plain, strict=True):
            images = preset.program.make(self.pipe, image, prompts[0], seed=seed, **run).run()
            made.append(Drawn(prompts, one, images, image))
        return made


def measure(presets: Presets, name: str, seeds: Sequence[int]) -> tuple[Rate, list[Drawn]]:
    """A preset's rate over some seeds, and what it drew."""
    started = time.perf_counter()
    every = presets.draw(name, seeds)
    right = [one for one in every if plain_right(one)]
    done = sum(JUDGES[name](one) for one in right)
    return Rate(len(seeds), len(right), done, round(time.perf_counter() - started, 1)), every


def sheet(name: str, every: Sequence[Drawn]) -> Image.Image:
    """A row for each seed: what was given, the plain image, and the preset's; seeds that the plain
    model fails at are bracketed, and failures are marked."""
    from hookctl.inspect import show

    rows, titles = [], []
    for seed, one in enumerate(every):
        rows.append([*([one.given] if one.given else []), one.plain, *one.edited])
        verdict = "right" if JUDGES[name](one) else "WRONG"
        titles.append(f"{seed}: {verdict}" if plain_right(one) else f"({seed}: {verdict})")
    return show.grid(rows, row_titles=titles, cell=(128, 128))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hookctl.demos.rates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="(default: all)")
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--images", type=Path, metavar="DIR", help="a sheet of each preset")
    parser.add_argument("--json", type=Path, metavar="FILE", help="kept up after each preset")
    options = parser.parse_args(arguments)
    if options.images is not None:
        options.images.mkdir(parents=True, exist_ok=True)
    presets = Presets()
    found: dict[str, Rate] = {}
    for name in options.presets or JUDGES:
        found[name], every = measure(presets, name, range(options.seeds))
        print(f"{name}: {found[name]}", flush=True)
        if options.images is not None:
            save_image(sheet(name, every), options.images / f"{name}.png")
        if options.json is not None:
            past = json.loads(options.json.read_text("utf-8")) if options.json.exists() else {}
            write_json(options.json, {**past, name: found[name]._asdict()})
    rows = [(name, r.seeds, r.plain, r.edited, f"{r.rate:.2f}") for name, r in found.items()]
    print(markdown_table(rows, ("preset", "seeds", "plain right", "of these right", "rate")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
