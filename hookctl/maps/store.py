"""Where attention maps are kept: each step's by itself, or as a running mean."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from hookctl.address.references import reference_name
from hookctl.address.rows import COND, UNCOND, Row
from hookctl.address.sites import Grid, Site
from hookctl.errors import WordError
from hookctl.inspect import notebook, show
from hookctl.maps.records import IMAGE, TARGET, MapKey, MapRecord, WordMaps, counted, extent

K = TypeVar("K", bound=Hashable)

SHOWN = 12  # maps, of a store in a notebook


class MapSums(Generic[K]):
    """Running sums of maps, one for each key."""

    def __init__(self) -> None:
        self._sums: dict[K, Tensor] = {}
        self._counts: dict[K, int] = {}

    def add(self, key: K, map: Tensor) -> None:
        """Add a map, [..., height, width]."""
        self._sums[key] = self._sums[key] + map if key in self._sums else map
        self._counts[key] = self._counts.get(key, 0) + 1

    def sum(self, key: K) -> Tensor | None:
        """The sum of the key's maps; None before the first."""
        return self._sums.get(key)

    def means(self) -> dict[K, tuple[Tensor, int]]:
        """By key the mean of its maps, and of how many; in the order of the first ones."""
        return {key: (self._sums[key] / n, n) for key, n in self._counts.items()}


def map_of(values: Tensor, grid: Grid) -> Tensor:
    """The map of a read-out [sub-batch, N, tokens], summed over tokens: [frames, height, width]."""
    return values.sum(-1).reshape(-1, grid.height, grid.width)


class MapStore:
    """The maps that were read in a run: `maps["cat"]` are those of a word, as `WordMaps`.

    maps.token(5): of a position of the text. maps.patch(0.5, 0.25): what the patch half the way
    down and a quarter to the right of the image looks at. maps.word("blurry", negative=True): of a
    word of the negative prompt, in its rows. to="image" or "references[0]": what these look at
    there; maps.target(0): what the whole image looks at in the first reference.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new run: nothing has been read."""
        self._each: list[MapRecord] = []
        self._sums = MapSums[_Mean]()
        # Sites and steps of the means, in their order.
        self._over: dict[_Mean, tuple[dict[Site, None], dict[int, None]]] = {}
        self._seen: set[tuple[MapKey, str, int, int, int]] = set()
        self._by_step: set[MapKey] = set()
        self.without_grid: dict[str, None] = {}  # sites that can't have maps, by path
        self.of_parts = False  # whether the model saw parts of the image, which have none

    def keep_steps(self, keys: Iterable[MapKey]) -> None:
        """Keep each step's maps of these by themselves, whoever else wants their means."""
        self._by_step.update(keys)

    def note(
        self,
        key: MapKey,
        site: Site,
        step: int,
        row: Row,
        values: Tensor,
        grid: Grid,
        *,
        mean: bool = False,
    ) -> None:
        """Keep a read-out: values [sub-batch, N, tokens], with its graph if it has one.

        mean: add it, without its graph, to the running mean over steps and over sites of its grid.
        Two editors may read one word at one site: the map is kept once, or means would lean to it.
        """
        seen = (key, site.path, step, row.prompt, row.image)
        if seen in self._seen:
            return
        self._seen.add(seen)
        map = map_of(values, grid)
        if not mean or key in self._by_step:
            self._each.append(MapRecord(key, (site,), (step,), row.prompt, row.image, map))
            return
        whose = _Mean(key, row.prompt, row.image, grid)
        self._sums.add(whose, map.detach().to(torch.promote_types(map.dtype, torch.float32)))
        sites, steps = self._over.setdefault(whose, ({}, {}))
        sites[site] = steps[step] = None

    @property
    def records(self) -> list[MapRecord]:
        """The maps that were kept by themselves, then the means."""
        means = [
            MapRecord(of.key, (*sites,), (*steps,), of.prompt, of.image, mean, count)
            for of, (mean, count) in self._sums.means().items()
            for sites, steps in [self._over[of]]
        ]
        return self._each + means

    @property
    def keys(self) -> tuple[MapKey, ...]:
        """Everything that maps were read of."""
        every = [*(record.key for record in self._each), *(mean.key for mean in self._over)]
        return tuple(dict.fromkeys(every))

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the prompts that maps were read of."""
        return tuple(
            k.of for k in self.keys if isinstance(k.of, str) and (k.branch, k.to) == (COND, None)
        )

    def __bool__(self) -> bool:
        return bool(self._each or self._over)

    def __contains__(self, word: object) -> bool:
        return word in self.words

    def __repr__(self) -> str:
        words = len(self.words)
        others = len(self.keys) - words
        said = counted(words, "word") + (f", {counted(others, 'other')}" if others else "")
        return f"<MapStore: {said}, {extent(self.records)}>"

    def _repr_html_(self) -> str:
        """The mean map of each word, side by side."""
        shown = self.keys[:SHOWN]
        if not shown:
            return notebook.html_lines([repr(self)])
        titles = [key.title for key in shown]
        maps = [self._of(key).mean().detach().cpu() for key in shown]
        scale = show.scale_of(maps)
        heat = [show.heatmap(one, (128, 128), scale=scale) for one in maps]
        strip = show.grid([heat], column_titles=titles, cell=(128, 128), scales=[scale])
        return notebook.html_lines([repr(self)]) + notebook.html_image(strip, ", ".join(titles))

    def every(self) -> list[WordMaps]:
        """The maps of everything that was read."""
        return [self._of(key) for key in self.keys]

    def __getitem__(self, word: str) -> WordMaps:
        return self.word(word)

    def word(self, word: str, *, negative: bool = False, to: str | None = None) -> WordMaps:
        """The maps of a word or phrase of the prompts, or of the negative ones.

        to: as it was given to `Maps`. This and what follows raise WordError for what was not read.
        """
        return self._of(MapKey(word, UNCOND if negative else COND, to))

    def token(self, position: int, *, negative: bool = False, to: str | None = None) -> WordMaps:
        """The maps of a position of the text sequence."""
        return self._of(MapKey(position, UNCOND if negative else COND, to))

    def patch(
        self, y: float, x: float, *, negative: bool = False, to: str | None = None
    ) -> WordMaps:
        """What a patch of the image looks at; y, x: as they were given to `Maps`."""
        branch = UNCOND if negative else COND
        return self._of(MapKey((float(y), float(x)), branch, None if to == IMAGE else to))

    def reference(self, index: int, *, negative: bool = False) -> WordMaps:
        """How much each place of the image looks at a reference image."""
        return self._of(MapKey(reference_name(index), UNCOND if negative else COND))

    def target(self, reference: int, *, negative: bool = False) -> WordMaps:
        """What the places of the image together look at in a reference image."""
        branch = UNCOND if negative else COND
        return self._of(MapKey(TARGET, branch, reference_name(reference)))

    def _of(self, key: MapKey) -> WordMaps:
        chosen = [record for record in self.records if record.key == key]
        if not chosen:
            recorded = ", ".join(known.quoted for known in self.keys) or "none"
            flat = ""
            if self.without_grid:
                flat = f" (no grid over the latent: {', '.join(self.without_grid)})"
            if self.of_parts:
                raise WordError(
                    f"no map of {key.quoted} was recorded: the image was drawn by tiles, each with "
                    "places of its own; draw it without MultiDiffusion to see its maps"
                )
            raise WordError(
                f"no map of {key.quoted} was recorded; recorded are: {recorded}{flat}. Add "
                f"hookctl.Maps({key.reader}) to the editors"
            )
        return WordMaps(key, chosen)


class _Mean(NamedTuple):
    """What a running mean is of."""

    key: MapKey
    prompt: int
    image: int
    grid: Grid
