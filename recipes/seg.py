"""SEG: guidance away from a prediction whose self-attention is smoothed.

Hong, "Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of
Attention", arXiv 2408.00760 (NeurIPS 2024). Blurring the attention weights over the queries is
blurring the queries, q' = G q, in the perturbed rows at the chosen sites:

    eps = eps_u + g (eps_c - eps_u) + s (eps_c - eps_p)          eps_c + s (eps_c - eps_p) without g

As sigma grows, all queries become their mean. The official code cuts its kernel at the side of the
grid, so that a wide blur there is a box and never the mean, and takes sigma > 9999 for infinity;
`paper=True` does the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.sites import Grid
from hookctl.arguments import checked, number
from hookctl.attention.call import AttentionCall
from hookctl.recipes.common.features.smoothing import blur, blur_matrix, cut_blur_matrix
from hookctl.recipes.common.perturbed_guidance import PerturbedGuidance
from hookctl.recipes.common.sites import grid_of

OFFICIAL_INFINITY = 9999.0  # sigma above it is infinite in the official code


class SEG(PerturbedGuidance):
    """Smoothed-energy guidance, after the pipeline's own.

    scale: s, 3 in the paper. sigma: width of the blur in tokens of the site's grid, math.inf for
        the mean query; 0 blurs nothing and costs nothing, as scale 0 does.
    branch: name of the perturbed branch. paper: blur exactly as the official code does.
    sites: the paper's is the middle block; start, stop: a window, outside of which it is free.

    Costs one further row beside each conditional one.
    """

    @checked(infinite=("sigma",))
    def __init__(
        self,
        scale: float = 3.0,
        sigma: float = math.inf,
        *,
        branch: str = "blurred",
        paper: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(scale, branch=branch, **options)
        self.sigma = number(sigma, "SEG: sigma", low=0, also=(math.inf,))
        self.paper = paper

    def neutral(self) -> bool | None:
        return self.sigma == 0 or super().neutral()

    def scale_at(self, clock: Clock) -> float:
        return self.scale if self.sigma else 0.0

    def attention(self, call: AttentionCall) -> None:
        rows = call.rows.where(branch=self.branch)
        if not rows:
            return
        grid = grid_of(call, self.name)
        start, stop = call.spans.image_queries

        def smooth(q: Tensor) -> Tensor:
            image = self.smoothed(q[..., start:stop, :], grid)
            return torch.cat([q[..., :start, :], image, q[..., stop:, :]], -2)

        call.map_queries(rows, smooth)

    def smoothed(self, q: Tensor, grid: Grid) -> Tensor:
        """Queries [..., frames * height * width, channels], blurred over each frame."""
        rows, columns = self._matrix(grid.height), self._matrix(grid.width)
        image = q.mT.unflatten(-1, (grid.frames, grid.height, grid.width))
        return blur(image, rows, columns).flatten(-3).mT

    def _matrix(self, size: int) -> Tensor:
        if not self.paper:
            return blur_matrix(size, self.sigma)
        if self.sigma > OFFICIAL_INFINITY:
            return blur_matrix(size, math.inf)
        length = math.ceil(6 * self.sigma)
        # The largest odd length that reflecting at the edges allows there.
        return cut_blur_matrix(size, self.sigma, min(length + 1 - length % 2, size + 1 - size % 2))
