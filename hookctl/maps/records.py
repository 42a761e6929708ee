"""Attention maps as they are asked for: of a word, token or patch, by step, site and grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.references import reference_index
from hookctl.address.rows import COND
from hookctl.address.sites import Site
from hookctl.arguments import checked, one_of
from hookctl.errors import InputError
from hookctl.inspect import files, notebook, show
from hookctl.inspect.moving import gif_options, moving

IMAGE = "image"  # as what is looked at: the image that is drawn
OVER = ("steps", "frames")
TARGET = "target"  # as what looks: every place of it


class MapKey(NamedTuple):
    """What a map is of.

    of: a word or phrase, a position of the text sequence, a patch (y, x) in fractions of the image,
    a reference image ("references[0]"), or "target", every place of the image that is drawn;
    branch: in whose rows, COND or UNCOND (those of the negative prompt). to: None for how much
    each place of the image looks at it (of a patch: what it looks at), "image" or "references[0]"
    for what it looks at there.
    """

    of: str | int | tuple[float, float]
    branch: str = COND
    to: str | None = None

    @property
    def relation(self) -> str:
        """Who looks at whom: "image to text", "text to image", "image to image", "target to
        reference", or "text to reference"."""
        into_reference = reference_index(self.to) is not None
        if reference_index(self.of) is not None or (self.of == TARGET and into_reference):
            return "target to reference"
        if isinstance(self.of, tuple):
            return "target to reference" if into_reference else "image to image"
        if self.to is None:
            return "image to text"
        return "text to reference" if into_reference else "text to image"

    @property
    def title(self) -> str:
        """'cat', 'token 5' or 'patch (0.5, 0.25)', what it looks at, and whether it is the negative
        prompt's."""
        return self._said("{}")

    @property
    def quoted(self) -> str:
        """As errors say it: words in quotes."""
        return self._said("{!r}")

    def _said(self, word: str) -> str:
        if isinstance(self.of, str):
            said = word.format(self.of)
        elif isinstance(self.of, int):
            said = f"token {self.of}"
        else:
            said = "patch ({:g}, {:g})".format(*self.of)
        said = said if self.to is None else f"{said} to {self.to}"
        return said if self.branch == COND else f"{said} (negative)"

    @property
    def reader(self) -> str:
        """The arguments of a `Maps` that reads it."""
        if isinstance(self.of, str):
            said = repr(self.of) if self.of != TARGET or self.to is None else ""
        else:
            said = f"{'tokens' if isinstance(self.of, int) else 'patches'}=[{self.of}]"
        if self.to is not None:
            said = ", ".join(part for part in (said, f"to={self.to!r}") if part)
        return said if self.branch == COND else f"{said}, negative=True"


@dataclass(frozen=True, eq=False)
class MapRecord:
    """A map of one image: of one site and step, or the mean over several of them.

    key: what it is of; sites, steps: over which it is the mean; prompt: index of the prompt; image:
    which of that prompt's images; map: [frames, height, width], averaged over heads and summed over
    the tokens of a word; count: of how many maps it is the mean.
    """

    key: MapKey
    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    prompt: int
    image: int
    map: Tensor = field(repr=False)
    count: int = 1

    @property
    def site(self) -> Site:
        """InputError for a mean over several."""
        if len(self.sites) > 1:
            raise self._mixed("site", len(self.sites))
        return self.sites[0]

    @property
    def step(self) -> int:
        """InputError for a mean over several."""
        if len(self.steps) > 1:
            raise self._mixed("step", len(self.steps))
        return self.steps[0]

    def is_of(self, sites: set[str] | None, steps: set[int] | None) -> bool:
        """Whether it is of some of these; InputError for a mean that is of others as well."""
        of_sites = _within({site.path for site in self.sites}, sites)
        of_steps = _within(set(self.steps), steps)
        if of_sites is False or of_steps is False:
            return False
        if of_sites is None:
            raise self._mixed("site", len(self.sites))
        if of_steps is None:
            raise self._mixed("step", len(self.steps))
        return True

    def _mixed(self, what: str, count: int) -> InputError:
        return InputError(
            f"the map of {self.key.quoted} is a running mean over {counted(count, what)}, so that "
            f"of one {what} is not known; hookctl.Maps({self.key.reader}, mean=False) keeps each "
            "by itself"
        )


def _within(its: set[Any], wanted: set[Any] | None) -> bool | None:
    """Whether all of something is wanted (True), nothing (False) or a part of it (None)."""
    if wanted is None or its <= wanted:
        return True
    return False if its.isdisjoint(wanted) else None


@dataclass(frozen=True, eq=False, repr=False)
class WordMaps:
    """The maps of one word, token or patch; narrow them by prompt, image, step, site or grid, then
    average."""

    key: MapKey
    records: Sequence[MapRecord]

    @property
    def word(self) -> str:
        """What they are of, such as "cat" or "token 5"."""
        return self.key.title

    @property
    def prompts(self) -> tuple[int, ...]:
        return tuple(sorted({r.prompt for r in self.records}))

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({step for r in self.records for step in r.steps}))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted({(r.map.shape[-2], r.map.shape[-1]) for r in self.records}))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.path for r in self.records for site in r.sites))

    def __repr__(self) -> str:
        grids = ", ".join(f"{height}x{width}" for height, width in self.grids)
        prompts = counted(len(self.prompts), "prompt")
        return f"<WordMaps {self.key.quoted}: {prompts}, {extent(self.records)}, grids {grids}>"

    def _repr_html_(self) -> str:
        """The mean map."""
        heat = show.heatmap(self.mean().detach().cpu())
        return notebook.html_lines([repr(self)]) + notebook.html_image(heat, self.word)

    @checked(own=("grid",))
    def where(
        self,
        *,
        prompt: int | None = None,
        image: int | None = None,
        steps: Iterable[int] | None = None,
        site: str | None = None,
        grid: tuple[int, int] | None = None,
    ) -> WordMaps:
        """The records that match; InputError if none does, or if one is a mean over others too."""
        wanted = None if steps is None else set(steps)
        sites = None if site is None else {site}
        chosen = [
            r
            for r in self.records
            if (prompt is None or r.prompt == prompt)
            and (image is None or r.image == image)
            and (grid is None or tuple(r.map.shape[-2:]) == tuple(grid))
            and r.is_of(sites, wanted)
        ]
        if not chosen:
            raise InputError(
                f"no map of {self.key.quoted} with prompt={prompt}, image={image}, steps={steps}, "
                f"site={site!r}, grid={grid}; there are prompts {self.prompts}, steps "
                f"{self.steps[:3]}..., grids {self.grids}"
            )
        return WordMaps(self.key, chosen)

    def mean(self, size: tuple[int, int] | None = None) -> Tensor:
        """Average over everything left, [height, width], on the finest grid or on `size`.

        Unless narrowed, the last prompt that holds the word and its first image are meant.
        """
        prompt = self.prompts[-1]
        image = min(r.image for r in self.records if r.prompt == prompt)
        chosen = [r for r in self.records if r.prompt == prompt and r.image == image]
        target = size or max((tuple(r.map.shape[-2:]) for r in chosen), key=lambda s: s[0] * s[1])
        by_grid: dict[Any, list[Tensor]] = {}
        for record in chosen:
            by_grid.setdefault(record.map.shape[-2:], []).append(
                record.map.float().mean(0) * record.count
            )
        sums = [
            F.interpolate(torch.stack(maps).sum(0)[None, None], size=target, mode="bilinear")[0, 0]
            for maps in by_grid.values()
        ]
        return torch.stack(sums).sum(0) / sum(record.count for record in chosen)

    def overlay(self, image: Any, **options: Any) -> Any:
        """The image with the mean map laid over it (`show.overlay`), on a scale from 0."""
        mean = self.mean().detach().cpu()
        return show.overlay(image, mean, **({"scale": show.scale_of([mean])} | options))

    def strip(self, image: Any = None, count: int = 8) -> Any:
        """One image of the map at up to `count` steps (`show.time_strip`).

        InputError if they were kept as a running mean.
        """
        steps = self.steps
        step = max(1, -(-len(steps) // count))
        chosen = list(steps[::step])
        maps = [self.where(steps=[step]).mean().detach().cpu() for step in chosen]
        return show.time_strip(maps, [f"step {step}" for step in chosen], image, bar=True)

    @property
    def frames(self) -> int:
        """Of how many frames of a video the maps are, 1 of an image."""
        return max(r.map.shape[0] for r in self.records)

    @checked(own=("image",))
    def gif(
        self,
        path: Path | str,
        image: Any = None,
        *,
        over: str = "steps",
        milliseconds: int = 200,
    ) -> Path:
        """Write the map as a GIF, a picture for each step, or for each frame of a video.

        path: of the file; image: to lay it over, or a list with one for each picture; over: "steps"
        or "frames"; milliseconds: that each picture is shown. Returns the path. InputError if the
        steps were kept as a running mean.
        """
        one_of(over, "gif: over", OVER)
        if over == "steps":
            parts = {f"step {step}": self.where(steps=[step]) for step in self.steps}
        else:
            parts = {f"frame {f}": self._of_frame(f) for f in range(self.frames)}
        maps = [part.mean().detach().cpu() for part in parts.values()]
        pictures = moving(maps, list(parts), image)
        files.save_image(pictures[0], Path(path), **gif_options(pictures, milliseconds))
        return Path(path)

    def _of_frame(self, frame: int) -> WordMaps:
        """The maps of one frame; those that hold one for all frames stay."""
        chosen = [
            r if r.map.shape[0] == 1 else replace(r, map=r.map[frame : frame + 1])
            for r in self.records
        ]
        return WordMaps(self.key, chosen)


def extent(records: Sequence[MapRecord]) -> str:
    """How many steps and sites maps are of, in words."""
    steps = {step for r in records for step in r.steps}
    sites = {site.path for r in records for site in r.sites}
    return f"{counted(len(steps), 'step')}, {counted(len(sites), 'site')}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
