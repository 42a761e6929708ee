"""STG: guidance away from a video whose blocks were skipped.

Hyung et al., "Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling", arXiv 2411.18664
(CVPR 2025). A copy of the conditional rows passes a block by (the residual form, STG-R, which the
published code has; `PAG` at the same sites is the other, STG-A):

    v = u + g (c - u) + s (c - p)               c + s (c - p) on distilled models
    v <- v (r std(c) / std(v) + 1 - r)          brought back to the spread of c
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hookctl.address import families
from hookctl.address.rows import COND
from hookctl.arguments import checked, share
from hookctl.loop.state import Predictions
from hookctl.recipes.common.added_guidance import rescaled
from hookctl.recipes.common.sites import sites_of_layers
from hookctl.recipes.skip_layer_guidance import SkippedBlocks

# Of the published code, by the class of the denoiser.
PUBLISHED = {
    "CogVideoXTransformer3DModel": 11,
    "HunyuanVideoTransformer3DModel": 2,
    "LTXVideoTransformer3DModel": 19,
    "MochiTransformer3DModel": 34,
}


class STG(SkippedBlocks):
    """Spatiotemporal skip guidance, after the pipeline's own.

    scale: strength s; 0 costs nothing.
    layers: the blocks that are passed by, counted from 0; None: the published one of CogVideoX
        (11), HunyuanVideo (2), LTX (19) and Mochi (34), and the middle one of other models.
    rescale: how far the result is brought back to the spread of the conditional prediction, r, 0
        to 1; 0.7 where the published code rescales; over each video.
    branch: name of the branch. sites: attention sites whose blocks are meant, in place of layers.
    start, stop: fractions of the schedule.

    Costs one further row beside each conditional one.
    """

    @checked(own=("layers",))
    def __init__(
        self,
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
        *,
        rescale: float = 0.0,
        branch: str = "skipped",
        **options: Any,
    ) -> None:
        super().__init__(scale, layers, branch=branch, **options)
        self.rescale = share(rescale, "STG: rescale")

    def attach(self, target: Any) -> None:
        super().attach(target)
        model = type(families.uncompiled(families.denoiser_of(target))).__name__
        if self.layers is None and self.given_sites is None and model in PUBLISHED:
            self.sites = sites_of_layers(self.name, target, [PUBLISHED[model]])

    def combine(self, predictions: Predictions) -> Tensor:
        guided = super().combine(predictions)
        if not self.scale or not self.rescale:
            return guided
        return rescaled(guided, predictions[COND].to(guided), self.rescale)
