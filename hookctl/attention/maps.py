"""Attention maps: by word, turn, site and grid, averaged over heads.

Maps are read out of the finished terms (edits included) as extra value columns; probabilities are
never kept. A map is a share of attention: at a cross-attention site the values of all text tokens
at one place sum to 1 (unless an edit rescaled them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.rows import Row
from hookctl.address.sites import Grid, Site
from hookctl.errors import InputError, WordError


@dataclass(frozen=True, eq=False)
class MapRecord:
    """One read-out: `map` is [frames, height, width], summed over the word's tokens."""

    word: str
    site: Site
    turn: int
    prompt: int
    image: int
    map: Tensor


@dataclass(eq=False)
class MapStore:
    """Every map that was read in a run, by word."""

    records: list[MapRecord] = field(default_factory=list)
    _seen: set[tuple[str, str, int, int, int]] = field(default_factory=set)

    def clear(self) -> None:
        self.records, self._seen = [], set()

    def note(self, word: str, site: Site, turn: int, row: Row, values: Tensor, grid: Grid) -> None:
        """Keep a read-out: values [sub-batch, N, tokens], with its graph if it has one.

        Two editors may read one word at one site: the map is kept once, or means would lean to it.
        """
        key = (word, site.path, turn, row.prompt, row.image)
        if key in self._seen:
            return
        self._seen.add(key)
        image = values.sum(-1)
        image = image.reshape(-1, grid.height, grid.width)
        self.records.append(MapRecord(word, site, turn, row.prompt, row.image, image))

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record.word for record in self.records))

    def __contains__(self, word: object) -> bool:
        return any(record.word == word for record in self.records)

    def __getitem__(self, word: str) -> WordMaps:
        chosen = [record for record in self.records if record.word == word]
        if not chosen:
            raise WordError(
                f"no map of {word!r} was recorded; recorded are: "
                f"{', '.join(map(repr, self.words)) or 'none'}. Add hookctl.Maps({word!r}) to "
                "the editors"
            )
        return WordMaps(word, chosen)


@dataclass(frozen=True, eq=False)
class WordMaps:
    """The maps of one word; narrow them by prompt, image, turn, site or grid, then average."""

    word: str
    records: Sequence[MapRecord]

    @property
    def prompts(self) -> tuple[int, ...]:
        return tuple(sorted({r.prompt for r in self.records}))

    @property
    def turns(self) -> tuple[int, ...]:
        return tuple(sorted({r.turn for r in self.records}))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted({(r.map.shape[-2], r.map.shape[-1]) for r in self.records}))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.site.path for r in self.records))

    def where(
        self,
        *,
        prompt: int | None = None,
        image: int | None = None,
        turns: Iterable[int] | None = None,
        site: str | None = None,
        grid: tuple[int, int] | None = None,
    ) -> WordMaps:
        """The records that match; InputError if none does."""
        wanted = None if turns is None else set(turns)
        chosen = [
            r
            for r in self.records
            if (prompt is None or r.prompt == prompt)
            and (image is None or r.image == image)
            and (wanted is None or r.turn in wanted)
            and (site is None or r.site.path == site)
            and (grid is None or tuple(r.map.shape[-2:]) == tuple(grid))
        ]
        if not chosen:
            raise InputError(
                f"no map of {self.word!r} with prompt={prompt}, image={image}, turns={turns}, "
                f"site={site!r}, grid={grid}; there are prompts {self.prompts}, turns "
                f"{self.turns[:3]}..., grids {self.grids}"
            )
        return WordMaps(self.word, chosen)

    def mean(self, size: tuple[int, int] | None = None) -> Tensor:
        """Average over everything left, [height, width], on the finest grid or on `size`.

        Unless narrowed, the last prompt that holds the word and its first picture are meant.
        """
        prompt = self.prompts[-1]
        image = min(r.image for r in self.records if r.prompt == prompt)
        chosen = [r for r in self.records if r.prompt == prompt and r.image == image]
        target = size or max((tuple(r.map.shape[-2:]) for r in chosen), key=lambda s: s[0] * s[1])
        by_grid: dict[Any, list[Tensor]] = {}
        for record in chosen:
            by_grid.setdefault(record.map.shape[-2:], []).append(record.map.float().mean(0))
        total, count = None, 0
        for maps in by_grid.values():
            mean = torch.stack(maps).sum(0)
            mean = F.interpolate(mean[None, None], size=target, mode="bilinear")[0, 0]
            total = mean if total is None else total + mean
            count += len(maps)
        assert total is not None  # where() and the store never leave an empty selection
        return total / count

    def overlay(self, image: Any, **options: Any) -> Any:
        """The picture with the mean map laid over it (`show.overlay`)."""
        from hookctl import show

        return show.overlay(image, self.mean().detach().cpu(), **options)

    def strip(self, image: Any = None, count: int = 8) -> Any:
        """One picture of the map at up to `count` turns (`show.time_strip`)."""
        from hookctl import show

        turns = self.turns
        step = max(1, -(-len(turns) // count))
        chosen = list(turns[::step])
        maps = [self.where(turns=[turn]).mean().detach().cpu() for turn in chosen]
        return show.time_strip(maps, [f"turn {turn}" for turn in chosen], image)
