"""BoxDiff: objects in boxes, by constraints on their attention maps.

Xie et al., "BoxDiff: Text-to-Image Synthesis with Training-Free Box-Constrained Diffusion", arXiv
2307.10816 (ICCV 2023). Maps M, steps and refinements are Attend-and-Excite's; for each object of
mask m, with top_P the mean of the largest share P of the cells,

    inner   l_fg = max(0, 1 - top_P(M m))
    outer   l_bg = max(0, top_P(M (1 - m)))
    corner  l_x = mean over columns of |max_rows M - max_rows m| near m's edges, l_y likewise
    L = sum over objects of l_fg + l_bg + l_x + l_y

and a refinement ends when the largest l_fg is low enough. A region need not be a box: its edges
are where its projection begins and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.per_prompt import Regions
from hookctl.arguments import checked, share, whole
from hookctl.loop.energy import ImageMaps
from hookctl.recipes.common.energy.energy_guidance import Stage
from hookctl.recipes.common.energy.excited_maps import ExcitedMaps
from hookctl.recipes.common.energy.map_functions import top_mean
from hookctl.recipes.common.energy.word_energy import Subject, Words


class BoxDiff(ExcitedMaps):
    """Keep the attention of words in regions.

        BoxDiff(["circle", "square"], [(0, 0, 0.5, 1), (0.5, 0, 1, 1)])

    words, regions: as many of each, for every prompt or a list for each. top: P, a share of the
    cells. reach: how many cells beside an edge count as near it. The others: see `ExcitedMaps`.
    paper: as there, and a refinement descends the largest l_fg alone, and the step after it has no
    gradient of the other terms, and the edges of boxes are rounded to cells. scale=0, or no words,
    leaves a run bit for bit as it was.

    A cell belongs to a region that covers half of it, and a region that is too small for that keeps
    the cells that it covers most, so that P of it is always at least one cell.
    """

    @checked(own=("regions",))
    def __init__(
        self,
        words: Words,
        regions: Regions,
        *,
        top: float = 0.2,
        reach: int = 1,
        paper: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(words, paper=paper, **options)
        self.set_regions(regions)
        self.top = share(top, "BoxDiff: top")
        self.reach = whole(reach, "BoxDiff: reach")
        self.depends_on_stage = paper

    def energy(self, image: ImageMaps, subjects: Sequence[Subject], stage: Stage) -> Tensor:
        maps = self.excited(image, subjects).mean(1)
        parts = [
            self.terms(m, s.mask(m[..., None], round if self.paper else None, never_empty=True))
            for m, s in zip(maps, subjects, strict=True)
        ]
        inner = torch.stack([part[0] for part in parts])
        if not self.paper or stage == "update":
            total = torch.stack(parts).sum()
        else:
            total = inner.amax() if stage == "refine" else inner.sum()
        return torch.stack([total, inner.amax()])

    def terms(self, m: Tensor, mask: Tensor) -> Tensor:
        """l_fg, l_bg, l_x, l_y of one object: its map and its mask, [height, width]."""
        inner = (1 - top_mean(m * mask, mask, self.top)).clamp_min(0)
        outer = top_mean(m * (1 - mask), 1 - mask, self.top).clamp_min(0)
        corners = [self._corner(m.amax(dim), mask.amax(dim)) for dim in (0, 1)]
        return torch.stack([inner, outer, *corners])

    def _corner(self, projected: Tensor, wanted: Tensor) -> Tensor:
        """l_x or l_y: projections of a map and of its mask on one axis, [cells]."""
        inside = wanted.nonzero().flatten()
        near = torch.zeros_like(wanted)
        for edge in (int(inside[0]), int(inside[-1]) + 1):
            near[max(edge - self.reach, 0) : edge + self.reach + 1] = 1
        return ((projected - wanted).abs() * near).mean()
