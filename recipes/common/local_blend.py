"""Local blend: keep an edit inside the places that chosen words attend to.

Part of Prompt-to-Prompt (Hertz et al., arXiv 2208.01626, section 3.2 "Local editing"). The mask of
a prompt is its words' attention, edits included, summed over the steps so far and over the sites
that hold the layout, and joined with the source's:

    M = [pool(sum of maps) / max > threshold],   x <- x_source + (M_source or M) (x - x_source)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.latent import over_latent
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Site
from hookctl.address.text import PromptText
from hookctl.attention.call import AttentionCall
from hookctl.kernels.latent_mixing import local_blend
from hookctl.loop.state import State
from hookctl.maps import MapKey, MapStore, MapSums, map_of
from hookctl.recipes.common.sites import layout_resolution
from hookctl.run_state import RunState

ImageSums = MapSums[tuple[int, int]]  # by prompt and image


class LocalBlend:
    """Sums the maps of words over steps, and takes the source's latents outside of their places.

    words, subtract: for each prompt, the words whose places may change and those whose may not;
    start: fraction of the schedule; thresholds: of both masks, relative to their maximum.
    """

    _sums: RunState[tuple[ImageSums, ImageSums]] = RunState(
        factory=lambda: (ImageSums(), ImageSums()), kept=True
    )
    _size: RunState[tuple[int, ...]] = RunState((0, 0), kept=True)
    _resolution: RunState[Fraction | None] = RunState(None, kept=True)
    _store: RunState[MapStore] = RunState()

    def __init__(
        self,
        words: Sequence[tuple[str, ...]],
        subtract: Sequence[tuple[str, ...]],
        start: float,
        thresholds: tuple[float, float],
    ) -> None:
        self.start = start
        # What may change, then what may not.
        self._words, self._thresholds = (words, subtract), thresholds

    def begin(self, sites: Iterable[Site], state: State) -> None:
        """A new run over these cross or joint sites.

        Raises UnsupportedError for a model whose sites' grids are unknown.
        """
        self._sums = (ImageSums(), ImageSums())
        self._resolution = layout_resolution("blend", sites, state.grid, "leave blend out")
        self._size, self._store = state.grid[-2:], state.maps
        self._store.keep_steps(
            MapKey(word) for kind in self._words for words in kind for word in words
        )

    def read(self, call: AttentionCall, texts: Sequence[PromptText]) -> None:
        """Ask for the maps of this call, if its site holds the layout."""
        if call.site.resolution != self._resolution or call.grid is None:
            return
        for row in call.rows.where(branch=COND):
            for sums, words_of in zip(self._sums, self._words, strict=True):
                words = words_of[row.prompt]
                tokens = [texts[row.prompt].find(word) for word in words]
                if tokens:
                    place = (call.site, call.clock.step, call.grid)
                    keep = partial(self._keep, sums, words, tokens, place)
                    call.read(row, [p for positions in tokens for p in positions], keep)

    def _keep(
        self,
        sums: ImageSums,
        words: tuple[str, ...],
        tokens: list[tuple[int, ...]],
        place: tuple[Site, int, Grid],
        row: Row,
        values: Tensor,
    ) -> None:
        """Add a read-out [sub-batch, N, tokens of all words] to the sums and the session's maps."""
        site, step, grid = place
        parts = values.split([len(positions) for positions in tokens], -1)
        for word, part in zip(words, parts, strict=True):
            self._store.note(MapKey(word), site, step, row, part, grid)
        # As in the official table of flags, a token that two words share counts once.
        columns = {p: i for i, p in enumerate(p for positions in tokens for p in positions)}
        image = map_of(values[..., list(columns.values())].detach(), grid)
        sums.add((row.prompt, row.image), image.to(torch.promote_types(image.dtype, torch.float32)))

    def after(self, state: State) -> None:
        """Take everything outside the masks from the source, in the latents after a step."""
        if state.clock.step + 1 <= int(self.start * state.clock.steps):
            return
        x, rows, axes = state.latents, state.images, state.axes
        index = {(row.prompt, row.image): row.index for row in rows}
        sources = [index[0, row.image] for row in rows]
        c = axes.index("c")
        channels_first = x.movedim(c, 1)
        inside = x.new_ones(len(x), *channels_first.shape[2:], dtype=torch.bool)
        for row in rows:
            mask = self.mask(row.prompt, row.image) if row.prompt else None
            if mask is not None:
                shaped = over_latent(mask, x[row.index], axes)
                inside[row.index] = shaped.movedim(c - 1, 0)[0]
        out = local_blend(channels_first, torch.tensor(sources, device=x.device), inside)
        state.latents = out.movedim(1, c)

    def mask(self, prompt: int, image: int = 0) -> Tensor | None:
        """Where an edit may show: bool [frames, height, width] over the latent.

        None where neither the source nor the edit has words to blend: then it may everywhere.
        """
        changing, fixed = (self._mask(kind, prompt, image) for kind in (0, 1))
        return changing if fixed is None or changing is None else changing & ~fixed

    def _mask(self, kind: int, prompt: int, image: int) -> Tensor | None:
        """The source's mask or that of a prompt: of the words to change (0) or to subtract (1)."""
        masks = []
        for p in {0, prompt}:
            total = self._sums[kind].sum((p, image))
            if total is None:
                continue
            pooled = total[:, None]
            if kind == 0:
                pooled = F.max_pool2d(pooled, 3, 1, 1)
            fine = F.interpolate(pooled, size=self._size)[:, 0]
            # A word that draws no attention at all masks nothing, instead of 0 / 0.
            highest = fine.amax((-2, -1), keepdim=True).clamp_min(1e-12)
            masks.append(fine / highest > self._thresholds[kind])
        return torch.stack(masks).any(0) if masks else None
