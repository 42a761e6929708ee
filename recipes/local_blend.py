"""Local blend: keep an edit inside the places that chosen words attend to.

Part of Prompt-to-Prompt (Hertz et al., arXiv 2208.01626, section 3.2 "Local editing"). The mask of
a prompt is its words' attention, summed over the turns so far, and the union with the source's:

    M = [pool(sum of maps) / max > threshold],   x <- x_source + (M_source or M) (x - x_source)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.rows import Row

Key = tuple[int, int]  # prompt, image


class LocalBlend:
    """Sums maps over turns and blends latents outside the words' places.

    thresholds: of the words' mask and of the subtracted words' mask, relative to the maximum.
    """

    def __init__(self, thresholds: tuple[float, float]) -> None:
        self.thresholds = thresholds
        self._words: dict[Key, Tensor] = {}
        self._subtract: dict[Key, Tensor] = {}

    def add(self, row: Row, values: Tensor, size: tuple[int, int], *, subtract: bool) -> None:
        """Add a read-out [frames, N, tokens] over a grid of `size`."""
        store = self._subtract if subtract else self._words
        image = values.float().sum(-1).unflatten(-1, size)
        key = (row.prompt, row.image)
        store[key] = store[key] + image if key in store else image

    def mask(self, row: Row, size: Sequence[int]) -> Tensor | None:
        """Where the edit of `row` may show: bool [frames, height, width], None before any map."""
        mine = self._one(self._words, row, size, 0)
        if mine is None:
            return None
        less = self._one(self._subtract, row, size, 1)
        return mine if less is None else mine & ~less

    def _one(
        self, store: dict[Key, Tensor], row: Row, size: Sequence[int], which: int
    ) -> Tensor | None:
        found = [store[key] for key in ((0, row.image), (row.prompt, row.image)) if key in store]
        if not found:
            return None
        masks = []
        for maps in found:
            pooled = maps[:, None] if which else F.max_pool2d(maps[:, None], 3, 1, 1)
            fine = F.interpolate(pooled, size=tuple(size))[:, 0]
            # A word that draws no attention at all masks nothing, instead of 0 / 0.
            top = fine.amax((-2, -1), keepdim=True).clamp_min(1e-12)
            masks.append(fine / top > self.thresholds[which])
        return torch.stack(masks).any(0)

    def blend(self, latents: Tensor, rows: Sequence[Row], grid: Sequence[int]) -> Tensor:
        """Latents [pictures, ...] with every edit's outside taken from its source."""
        place = {(row.prompt, row.image): row.index for row in rows}
        out = latents.clone()
        for row in rows:
            mask = self.mask(row, grid[-2:]) if row.prompt else None
            if mask is None:
                continue
            source = latents[place[0, row.image]]
            out[row.index] = torch.where(_fit(mask, source), latents[row.index], source)
        return out


def _fit(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask [frames, height, width] in the shape of one latent of any family."""
    if latent.dim() == 2:  # packed tokens [height * width, channels]
        return mask[0].reshape(-1, 1)
    if latent.dim() == 4:  # [channels, frames, height, width]
        return mask[None] if mask.shape[0] in (1, latent.shape[1]) else mask[:1][None]
    return mask
