"""`hookctl maps`: which places of an image attend to which words of its prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hookctl
from hookctl.cli import common, scheduled
from hookctl.cli.draw import Drawing, pictures
from hookctl.cli.lora import add_lora, check_loras, put_on, said
from hookctl.cli.models import find_model
from hookctl.cli.quiet import quiet
from hookctl.errors import InputError
from hookctl.inspect import table

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from hookctl.address.regions import Region
    from hookctl.maps import WordMaps

_TEXT = """
Draw an image and write the attention maps of its words: how much each place attends to a word,
averaged over heads, sites and steps of the schedule. With --patch, how much a place attends to the
others; with --to, what words and places attend to in the image or in a reference.

writes to --out (default: out/maps-MODEL):
  image.png         what was drawn
  maps.png          every word over the image
  overlay-WORD.png  one word over the image
  grids-WORD.png    the word on each grid of the model
  time-WORD.png     the word over the steps
  moves-WORD.gif    the same as a moving picture, with --gif
  maps.npz          WORD@HxW [steps, H, W], float32, for each word and grid
  maps.json         figures of each map, and what was run
"""
_ALSO = "image.png, overlay-*, grids-*, time-*, maps.npz, maps.json"
_EXAMPLES = """
hookctl maps shapes --prompt "a red circle above a blue square" --words circle,square --gif
hookctl maps ./sd15 --prompt "a cat on a mat" --words "cat,on a mat" --steps 20 --seed 3
hookctl maps shapes --prompt "a red circle" --patch 0.5,0.5         # what the middle looks at
hookctl maps ./klein --prompt "the cat on a mat" --reference cat.png --to "references[0]"
hookctl maps owner/name --prompt "a cat" --dtype float16 --device cuda
"""


def add(commands: Any) -> None:
    command = common.add_command(
        commands,
        "maps",
        main,
        "write the attention maps of the words of a prompt",
        _TEXT,
        _EXAMPLES,
    )
    command.add_argument("model", metavar="MODEL", help=common.MODEL_HELP)
    common.add_setting(command, "prompt", required=True)
    command.add_argument(
        "--words", type=common.words, metavar="A,B", help="words or phrases (default: every word)"
    )
    command.add_argument(
        "--patch",
        action="append",
        type=_place,
        default=[],
        metavar="Y,X",
        help="what a place looks at, from 0 to 1 down and to the right; may be repeated (without "
        "--words, the maps of words are left out)",
    )
    command.add_argument(
        "--to",
        metavar="WHAT",
        help="what words and places look at there, in place of how much the image looks at them: "
        "image (text and image in one sequence), or references[0]",
    )
    command.add_argument(
        "--reference",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="an image that an edit model is given, references[0] and so on; may be repeated",
    )
    command.add_argument(
        "--gif",
        nargs="?",
        const="steps",
        choices=("steps", "frames"),
        help="also write the maps as GIFs, over the steps (default) or the frames of a video",
    )
    add_lora(command)
    common.add_out(command, "out/maps-MODEL")
    common.add_drawing(command, images=False)
    common.add_machine(command)
    common.add_progress(command)


def _place(text: str) -> tuple[float, float]:
    """The type of an option that is a place in the image."""
    parts = text.split(",")
    try:
        y, x = (common.number(part) for part in parts)
    except (ValueError, argparse.ArgumentTypeError):
        y = x = -1.0
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} given; Y,X expected, each from 0 to 1")
    return y, x


def main(options: Any) -> None:
    drawing = Drawing.of(options)
    if not options.prompt.strip():
        raise InputError(f"--prompt {options.prompt!r} has no words; give a text to read maps of")
    scheduled.check_none([options.prompt], "hookctl maps")
    check_loras(options.lora)
    find_model(options.model)
    words = [word for word in options.words or () if not word.startswith("references[")]
    common.check_words(words, [options.prompt])
    for path in options.reference:
        if not path.is_file():
            raise FileNotFoundError(f"--reference {path}: there is no such file")
    with common.out_folder(options.out, "maps", Path(options.model).name) as out:
        _write(drawing, out, options)


@quiet()
def _write(drawing: Drawing, out: Path, options: Any) -> None:
    import numpy as np

    from hookctl.address.references import reference_index
    from hookctl.address.regions import Region
    from hookctl.arguments import opened
    from hookctl.cli.loading import load_pipeline
    from hookctl.inspect import show

    references = [opened(path, "--reference") for path in options.reference]
    pipe = load_pipeline(options.model, options.device, options.dtype)
    put_on(pipe, options.lora)
    # Each step by itself, for the files of time-WORD and maps.npz.
    reader = hookctl.Maps(*(options.words or ()), patches=options.patch, to=options.to, mean=False)
    with hookctl.control(pipe, reader) as session:
        progress = common.wants_progress(options)
        [frames] = pictures(pipe, drawing, [options.prompt], "maps", progress, references)
    image = frames[0]
    words = {found.word: found for found in session.maps.every()}
    marks: dict[str, list[Region]] = {}
    for y, x in options.patch:
        found = session.maps.patch(y, x, to=options.to)
        if reference_index(found.key.to) is None:  # the place itself is in the image
            marks[found.word] = [Region.point(x, y)]
    into = reference_index(options.to)
    under = image if into is None else references[into]  # what the maps are of
    common.save_image(image, out / "image.png")
    names = _names(words)
    means = {word: maps.mean().detach().cpu() for word, maps in words.items()}
    # Shares of words and of places are of different sizes: rows, and scales, of their own.
    sheets: list[Any] = []
    scales: dict[str, tuple[float, float]] = {}
    for group in ([w for w in words if w not in marks], list(marks)):
        if group:
            sheet, of_group = show.map_sheet(under, {w: means[w] for w in group}, marks)
            sheets.append(sheet)
            scales |= of_group
    common.save_image(show.stacked(sheets), out / "maps.png")
    for word, maps in words.items():
        over = show.overlay(under, means[word], scale=scales[word], regions=marks.get(word, ()))
        alone = show.grid([[over]], [word], scales=[scales[word]])
        common.save_image(alone, out / f"overlay-{names[word]}.png")
        common.save_image(_grids(maps), out / f"grids-{names[word]}.png")
        common.save_image(maps.strip(under), out / f"time-{names[word]}.png")
        if options.gif:
            over_frames = options.gif == "frames" and len(frames) == maps.frames
            maps.gif(
                out / f"moves-{names[word]}.gif",
                frames if over_frames else under,
                over=options.gif,
            )
    arrays = {f"{word}@{h}x{w}": a for word, m in words.items() for (h, w), a in _arrays(m).items()}
    with common.writing(out / "maps.npz") as path:
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    figures = {word: _figures(maps) for word, maps in words.items()}
    common.write_json(
        out / "maps.json",
        {
            "model": options.model,
            "loras": said(options.lora),
            "prompt": options.prompt,
            "to": options.to,
            "references": [str(path) for path in options.reference],
            **drawing.data(),
            "words": {w: {"file": names[w], **f} for w, f in figures.items()},
            "versions": common.versions(),
        },
    )
    rows = [(w, f["share"], *f["centre"], *f["peak"]) for w, f in figures.items()]
    print(table(rows, ("word", "share", "centre x", "centre y", "peak x", "peak y")))
    also = f"{_ALSO}, moves-*" if options.gif else _ALSO
    print(f"\nlook at {out / 'maps.png'}; also written: {also}")


def _names(words: Any) -> dict[str, str]:
    """A file name for each word, none twice."""
    names: dict[str, str] = {}
    for word in words:
        name = common.file_name(word)
        while name.lower() in {n.lower() for n in names.values()}:
            name += "_"
        names[word] = name
    return names


def _grids(maps: WordMaps) -> Image:
    """The mean map on each grid, side by side."""
    from hookctl.inspect import show

    means = [maps.where(grid=grid).mean().detach().cpu() for grid in maps.grids]
    titles = [f"{h} x {w}" for h, w in maps.grids]
    scale = show.scale_of(means)
    heat = [show.heatmap(mean, scale=scale) for mean in means]
    return show.grid([heat], titles, [maps.word], scales=[scale])


def _arrays(maps: WordMaps) -> dict[tuple[int, int], np.ndarray[Any, Any]]:
    """(h, w) -> the maps of that grid by step [steps, h, w], float32."""
    import torch

    found = {}
    for grid in maps.grids:
        on_grid = maps.where(grid=grid)
        by_step = [on_grid.where(steps=[t]).mean().detach().float().cpu() for t in on_grid.steps]
        found[grid] = torch.stack(by_step).numpy()
    return found


def _figures(maps: WordMaps) -> dict[str, Any]:
    """share: mean attention to the word; centre, peak: (x, y) from 0 to 1, right and down."""
    import torch

    mean: Tensor = maps.mean().detach().double().cpu()
    height, width = mean.shape
    weight = mean / mean.sum().clamp_min(1e-12)
    xs, ys = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (width, height))
    top = int(mean.argmax())
    return {
        "relation": maps.key.relation,
        "share": round(float(mean.mean()), 6),
        "centre": _point((weight.sum(0) @ xs) / width, (weight.sum(1) @ ys) / height),
        "peak": _point((top % width + 0.5) / width, (top // width + 0.5) / height),
        "grids": [f"{h}x{w}" for h, w in maps.grids],
        "steps": len(maps.steps),
        "sites": list(maps.sites),
    }


def _point(x: Any, y: Any) -> tuple[float, float]:
    return round(float(x), 4), round(float(y), 4)
