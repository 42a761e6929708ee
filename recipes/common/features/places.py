"""Features of a part of the image: of the tokens that a mask touches, or of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.regions import Region
from hookctl.address.sites import Grid, Site
from hookctl.attention.call import AttentionCall
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.features.size import token_grid
from hookctl.recipes.common.features.store import FeatureInjector, FeatureKeeper, FeatureStore
from hookctl.recipes.common.real_images.flow import length
from hookctl.recipes.common.sites import IMAGE_KINDS, image_sites

Path = dict[int, Tensor]  # latents by level, [images, ...]


class BackgroundStore(FeatureStore):
    """Keeps what attention has of the tokens that a mask leaves alone.

    cells: bool [height, width] of the latents' grid, True inside the mask.
    """

    def __init__(
        self, who: str, sites: Sequence[Site], names: Sequence[str], cells: Tensor, **options: Any
    ) -> None:
        super().__init__(who, sites, names, **options)
        self.cells = cells

    @classmethod
    def of(
        cls, who: str, program: Trajectory, region: Region, bilinear: bool, **options: Any
    ) -> BackgroundStore:
        """Of the keys and values of every site where the image attends to itself.

        bilinear: a cell is inside where the mask, of the image's size, is not 0 after bilinear
        resizing; else where the region touches it.
        """
        grid = tuple(program.unpacked().shape[-2:])
        assert program.size is not None  # a real image has one
        covered = region.coverage(*(program.size if bilinear else grid))
        if bilinear:
            covered = F.interpolate(covered[None, None], grid, mode="bilinear")[0, 0]
        sites = image_sites(who, program.pipe, lambda site: site.kind in IMAGE_KINDS)
        return cls(who, sites, ("k", "v"), covered > 0, **options)

    def share(self, program: Trajectory) -> float:
        return 1 - float(touched(self.cells, token_grid(self.sites[0], program)).double().mean())

    def background(self, call: AttentionCall) -> Tensor:
        """Of the image's tokens, bool [tokens]."""
        return ~touched(self.cells, call.require_grid(self.who)).to(call.k.device)

    def select(self, call: AttentionCall, x: Tensor) -> Tensor:
        return x[..., self.background(call), :]

    def restore(self, call: AttentionCall, own: Tensor, kept: Tensor) -> Tensor:
        background = self.background(call)
        self._check(call, kept, int(background.sum()), "draw the size that was inverted")
        whole = own.clone()
        whole[..., background, :] = kept
        return whole


class SourcePass(FeatureKeeper):
    """Keeps the background; separate: neither side of the mask sees the other meanwhile."""

    def __init__(self, store: BackgroundStore, *, separate: bool) -> None:
        super().__init__(store)
        self.background, self.separate = store.background, separate

    def attention(self, call: AttentionCall) -> None:
        super().attention(call)
        if self.separate and self.moment is not None:
            call.restrict(call.rows, *separated(call, ~self.background(call)))

    def invert(
        self,
        velocity: Callable[[Tensor, int], Tensor],
        image: Tensor,
        program: Trajectory,
        stop: int,
        *,
        published: bool,
    ) -> Path:
        """Euler's inversion of an image up to a level; the latents of every level.

        velocity: of latents at a level. What is kept at a level is asked for there, that of the
        last one by a call of its own; published: without that one, and at the clean end too.
        """
        last = program.steps
        path, x = {last: image}, image
        for i in reversed(range(stop, last)):
            self.moment = (i + 1, 0) if published or i + 1 < last else None
            v = velocity(x, i + 1)
            x = path[i] = x + length(program, i + 1, i) * v
        if not published:
            self.moment = (stop, 0)
            velocity(x, stop)
        return path


class EditPass(FeatureInjector):
    """Puts the background in its place; bias: is added to the scores of its keys."""

    def __init__(self, store: BackgroundStore, *, bias: float) -> None:
        super().__init__(store)
        self.background, self.bias = store.background, bias

    def attention(self, call: AttentionCall) -> None:
        super().attention(call)
        if self.bias and self.moment is not None:
            factors = call.k.new_zeros(call.k.shape[-2])
            span = call.spans.image_keys or (0, len(factors))
            factors[slice(*span)] = self.bias * self.background(call)
            call.bias(call.rows, key_factors=factors)


def touched(cells: Tensor, grid: Grid) -> Tensor:
    """Which tokens hold a cell of a mask, bool [tokens], the same in every frame."""
    pooled: Tensor = F.adaptive_max_pool2d(cells.float()[None, None], (grid.height, grid.width))
    return (pooled > 0).flatten().repeat(grid.frames)


def in_latents(cells: Tensor, program: Trajectory) -> Tensor:
    """A mask of the latents' grid in the form of a program's latents, bool [1, ...]."""
    grid = program.unpacked()[:1]
    return program.packed(cells.to(grid).expand(grid.shape)) > 0


def separated(call: AttentionCall, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Bit sets of queries and keys for `restrict`: the image's tokens inside and outside of a mask
    see their own side and the text, and the text sees all. inside: bool [tokens]."""
    found = []
    for tokens, span in (
        (call.q.shape[-2], call.spans.image_queries),
        (call.k.shape[-2], call.spans.image_keys or (0, call.k.shape[-2])),
    ):
        bits = torch.full((tokens,), 3, dtype=torch.int64, device=call.q.device)
        bits[slice(*span)] = torch.where(inside.to(call.q.device), 1, 2)
        found.append(bits)
    return found[0], found[1]
