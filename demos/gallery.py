"""The gallery: one page with the image and the figures of every demo.

    hookctl demo all --seeds 32 --out out
    hookctl demo all --seeds 32 --model shapes-flow --out out/flow
    python -m hookctl.demos.gallery --from out --flow out/flow --to demos/gallery

The first two write `gallery.md` beside the images as the demos drew them; the third makes a page
small enough to keep, `demos/gallery.md` with its images in `demos/gallery/`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from hookctl.demos import DEMOS, OF_FLOW
from hookctl.demos.reports import groups, singles, title_of
from hookctl.errors import InputError
from hookctl.inspect import markdown_table
from hookctl.inspect.files import write_text, writing

LARGEST, ALTOGETHER = 300_000, 6_000_000  # bytes: of one image, of all
WIDEST = 1400  # px

Link = Callable[[Path], str]


@dataclass(frozen=True)
class Shown:
    """One demo: its report, or why there is none, and the images it drew; `flow`: the same on the
    flow-matching pipeline."""

    name: str
    report: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    images: tuple[Path, ...] = ()
    flow: Shown | None = None

    @classmethod
    def of(cls, name: str, report: Mapping[str, Any], folder: Path) -> Shown:
        """A demo that has run, and the folder that it wrote to."""
        return cls(name, report, None, tuple(sorted(folder.glob("grid*.png"))))

    @classmethod
    def found(cls, name: str, out: Path) -> Shown | None:
        """A demo whose report is in its folder of `out`."""
        report = out / name / "report.json"
        if not report.is_file():
            return None
        return cls.of(name, json.loads(report.read_text("utf-8")), out / name)


def page(shown: Sequence[Shown], link: Link) -> str:
    """The page in Markdown; `link` says where an image is found from there."""
    parts = ["# Gallery", _INTRODUCTION]
    for one in shown:
        parts += _section(one, link)
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = (
    "Every method on the embedded pipeline, beside the plain image of the same noise. The "
    "figures are read off the images by the detector."
)


def _section(one: Shown, link: Link) -> Iterator[str]:
    title = title_of(one.name)
    yield f"## {title[0].upper()}{title[1:]}"
    what = DEMOS.get(one.name, "")
    yield f"{what[:1].upper()}{what[1:]}."
    if one.error is not None:
        yield f"**Failed**: {one.error}"
        return
    yield from _shown(one, link)
    if one.flow is not None:
        yield "On the flow-matching pipeline (`--model shapes-flow`):"
        yield from _shown(one.flow, link)


def _shown(one: Shown, link: Link) -> Iterator[str]:
    for image in one.images:
        yield f"![{title_of(one.name)}]({link(image)})"
    for group in groups(one.report):
        yield markdown_table(group.rows, group.headers)
    alone = singles({k: v for k, v in one.report.items() if k != "demo"})
    yield "; ".join(f"{name} {value}" for name, value in alone.items())


def write_page(out: Path, shown: Sequence[Shown]) -> Path:
    """`out/gallery.md`, for the folder that the demos wrote to."""
    path = out / "gallery.md"
    write_text(path, page(shown, lambda p: p.relative_to(out).as_posix()))
    return path


def write_small(out: Path, shown: Sequence[Shown]) -> Path:
    """The page `out.md` and small images in the folder `out`, which holds nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    named = [(one.name, image) for one in shown for image in one.images]
    twins = [one.flow for one in shown if one.flow is not None]
    named += [(f"{one.name}_flow", image) for one in twins for image in one.images]
    limit = min(LARGEST, ALTOGETHER // max(1, len(named)))
    places: dict[Path, str] = {}
    for name, image in named:
        stem = image.stem.replace("grid", name, 1)
        places[image] = f"{out.name}/{stem}.jpg"
        with writing(out / f"{stem}.jpg") as part:
            part.write_bytes(small(Image.open(image), limit))
    path = out.with_suffix(".md")
    write_text(path, page(shown, places.__getitem__))
    return path


def small(image: Image.Image, limit: int) -> bytes:
    """An image as JPEG of at most `limit` bytes: coarser first, then smaller."""
    image = image.convert("RGB")
    scale = min(1.0, WIDEST / image.width)
    while True:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        resized = image.resize(size, Image.Resampling.LANCZOS) if scale < 1 else image
        for quality in (90, 80, 70):
            data = BytesIO()
            resized.save(data, "JPEG", quality=quality, optimize=True)
            if data.tell() <= limit or max(size) == 1:
                return data.getvalue()
        scale *= 0.85


def _beside(one: Shown, flow: Path) -> Shown:
    """A demo with what it drew on the flow-matching pipeline, unless it is of that alone."""
    return one if one.name in OF_FLOW else replace(one, flow=Shown.found(one.name, flow))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hookctl.demos.gallery", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--from", dest="source", type=Path, default=Path("out"), metavar="DIR")
    parser.add_argument("--to", type=Path, default=Path("demos/gallery"), metavar="DIR")
    parser.add_argument("--flow", type=Path, metavar="DIR", help="those of shapes-flow")
    options = parser.parse_args(arguments)
    shown = [one for name in DEMOS if (one := Shown.found(name, options.source))]
    if not shown:
        raise InputError(
            f"--from {options.source}: holds no report of a demo; run `hookctl demo all --out "
            f"{options.source}` first"
        )
    if options.flow is not None:
        shown = [_beside(one, options.flow) for one in shown]
    print(f"written: {write_small(options.to, shown)}")
    missing = set(DEMOS) - {one.name for one in shown}
    if missing:
        print(f"not in it, for want of a report: {', '.join(sorted(missing))}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
