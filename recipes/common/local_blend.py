"""Local blend: keep an edit inside the places that chosen words attend to.

Part of Prompt-to-Prompt (Hertz et al., arXiv 2208.01626, section 3.2 "Local editing"). The mask of
a prompt is its words' attention, edits included, summed over the steps so far and over the sites
that hold the layout, and joined with the source's:

    M = [pool(sum of maps) / max > threshold],   x <- x_source + (M_source or M) (x - x_source)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.latent import finest_within, over_latent
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Site
from hookctl.address.text import PromptText
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError
from hookctl.kernels.latent_mixing import local_blend
from hookctl.loop.state import State

Words = str | Sequence[str] | None
Key = tuple[int, int]  # prompt, image


class LocalBlend:
    """Sums the maps of words over steps and blends latents outside the words' places.

    words, less: for each prompt, the words whose places may change and those whose may not;
    thresholds: of both masks, relative to the maximum; start: fraction of the schedule.
    """

    def __init__(
        self,
        words: Sequence[tuple[str, ...]],
        less: Sequence[tuple[str, ...]],
        start: float,
        thresholds: tuple[float, float],
    ) -> None:
        self.words, self.less, self.start, self.thresholds = words, less, start, thresholds
        self.restart()

    def restart(self) -> None:
        self._sums: tuple[dict[Key, Tensor], dict[Key, Tensor]] = ({}, {})
        self._size: tuple[int, ...] = (0, 0)

    def begin(self, sites: Iterable[Site], state: State) -> None:
        """A new run over these cross or joint sites."""
        self.restart()
        layout = finest_within(sites, state.grid) if state.grid else None
        if layout is None:
            raise UnsupportedError(
                "blend: this model does not tell the grid of its attention sites, so no site's "
                "maps can be laid over its latents; leave blend out"
            )
        self._resolution, self._size, self._maps = layout, state.grid[-2:], state.maps

    def read(self, call: AttentionCall, texts: Sequence[PromptText]) -> None:
        """Ask for the maps of this call, if its site holds the layout."""
        if call.site.resolution != self._resolution or call.grid is None:
            return
        for row in call.rows.where(branch=COND):
            for which, words in enumerate((self.words[row.prompt], self.less[row.prompt])):
                tokens = [texts[row.prompt].find(word) for word in words]
                if tokens:
                    place = (call.site, call.clock.step, call.grid)
                    keep = partial(self._keep, which, words, tokens, place)
                    call.read(row, [p for t in tokens for p in t], keep)

    def _keep(
        self,
        which: int,
        words: tuple[str, ...],
        tokens: list[tuple[int, ...]],
        place: tuple[Site, int, Grid],
        row: Row,
        values: Tensor,
    ) -> None:
        """Add a read-out [sub-batch, N, tokens of all words] to the sums and to the store."""
        site, step, grid = place
        parts = values.split([len(t) for t in tokens], -1)
        for word, part in zip(words, parts, strict=True):
            self._maps.note(word, site, step, row, part, grid)
        # As in the official table of flags, a token that two words share counts once.
        columns = {p: i for i, p in enumerate(p for t in tokens for p in t)}
        image = values.detach()[..., list(columns.values())].sum(-1)
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        image = image.reshape(-1, grid.height, grid.width)
        sums, key = self._sums[which], (row.prompt, row.image)
        sums[key] = sums[key] + image if key in sums else image

    def after(self, state: State) -> None:
        """Take everything outside the masks from the source, in the latents after a step."""
        if state.clock.step + 1 <= int(self.start * state.clock.steps):
            return
        x, rows, packed = state.latents, state.images, state.latents.dim() == 3
        place = {(row.prompt, row.image): row.index for row in rows}
        sources = [place[0, row.image] for row in rows]
        channels_first = x.mT if packed else x
        inside = x.new_ones(len(x), *channels_first.shape[2:], dtype=torch.bool)
        for row in rows:
            mask = self.mask(row.prompt, row.image) if row.prompt else None
            if mask is not None:
                shown = over_latent(mask, x[row.index])
                inside[row.index] = (shown.mT if packed else shown)[0]
        out = local_blend(channels_first, torch.tensor(sources, device=x.device), inside)
        state.latents = out.mT if packed else out

    def mask(self, prompt: int, image: int = 0) -> Tensor | None:
        """Where an edit may show: bool [frames, height, width] over the latent.

        None where neither the source nor the edit has words to blend: then it may everywhere.
        """
        mine, less = (self._one(which, prompt, image) for which in (0, 1))
        return mine if less is None or mine is None else mine & ~less

    def _one(self, which: int, prompt: int, image: int) -> Tensor | None:
        sums = self._sums[which]
        masks = []
        for key in {(0, image), (prompt, image)} & set(sums):
            pooled = sums[key][:, None]
            if which == 0:
                pooled = F.max_pool2d(pooled, 3, 1, 1)
            fine = F.interpolate(pooled, size=self._size)[:, 0]
            # A word that draws no attention at all masks nothing, instead of 0 / 0.
            top = fine.amax((-2, -1), keepdim=True).clamp_min(1e-12)
            masks.append(fine / top > self.thresholds[which])
        return torch.stack(masks).any(0) if masks else None


def words_of(value: Words | Sequence[Words], prompts: int, name: str) -> list[tuple[str, ...]]:
    """Words for each prompt: one word for all, or one entry (a word, several, None) for each."""
    entries = list(value) if isinstance(value, list | tuple) else [value] * prompts
    if len(entries) != prompts:
        raise InputError(
            f"{name}={value!r} has {len(entries)} entries for {prompts} prompts; give one word "
            "for all, or one entry for each prompt: a word, several, or None"
        )
    out = []
    for entry in entries:
        words = [entry] if isinstance(entry, str) else entry or ()
        if not isinstance(words, Sequence) or any(not isinstance(word, str) for word in words):
            raise InputError(f"{name}={value!r}; {entry!r} is neither a word, words nor None")
        out.append(tuple(words))
    return out
