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

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.sites import Grid, Selector
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes.common.perturbed_guidance import PerturbedGuidance
from hookctl.recipes.common.smoothing import blur, blur_matrix, cut_blur_matrix

ENDLESS = 9999.0  # the official code's sigma of infinity


class SEG(PerturbedGuidance):
    """Smoothed-energy guidance, after the pipeline's own.

    scale: s, 3 in the paper. sigma: width of the blur in tokens of the site's grid, math.inf for
        the mean query; 0 blurs nothing and costs nothing, as scale 0 does.
    sites: the paper's is the middle block; start, stop: a window, outside of which it is free.
    branch: name of the perturbed branch. paper: blur exactly as the official code does.

    Costs one further row beside each conditional one.
    """

    def __init__(
        self,
        scale: float = 3.0,
        sigma: float = math.inf,
        *,
        sites: Selector = None,
        start: float = 0.0,
        stop: float = 1.0,
        branch: str = "blurred",
        paper: bool = False,
    ) -> None:
        super().__init__(scale, branch, sites, start, stop)
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not sigma >= 0:
            raise InputError(f"SEG: sigma={sigma!r}; give a width of 0 or more, or math.inf")
        self.sigma, self.paper = float(sigma), paper

    def scale_at(self, clock: Clock) -> float:
        return self.scale if self.sigma else 0.0

    def attention(self, call: AttentionCall) -> None:
        rows = call.rows.where(branch=self.branch)
        if not rows:
            return
        grid = call.grid
        if grid is None:
            raise UnsupportedError(
                f"SEG: the queries of {call.site.path} form no grid over the latent, so they can't "
                "be blurred; leave it out with sites="
            )
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
        if self.sigma > ENDLESS:
            return blur_matrix(size, math.inf)
        length = math.ceil(6 * self.sigma)
        # The largest odd length that reflecting at the edges allows there.
        return cut_blur_matrix(size, self.sigma, min(length + 1 - length % 2, size + 1 - size % 2))
