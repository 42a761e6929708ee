"""SLG: guidance away from a prediction that leaves out some blocks of the transformer.

Stability AI, Stable Diffusion 3.5 (github.com/Stability-AI/sd3.5), after Karras et al., "Guiding a
Diffusion Model with a Bad Version of Itself", arXiv 2406.02507. A copy of the conditional rows
passes a few blocks by, image and text alike:

    v = u + g (c - u) + s (c - c_skip)          c + s (c - c_skip) without g
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookctl.address.clock import Clock
from hookctl.arguments import checked, refusal, whole
from hookctl.loop.inserting import BlockCall
from hookctl.recipes.common.perturbed_guidance import PerturbedGuidance
from hookctl.recipes.common.sites import IMAGE_KINDS, sites_of_layers


class SkippedBlocks(PerturbedGuidance):
    """Base of guidance by rows that pass blocks by. layers: which, counted from 0."""

    kinds = (*IMAGE_KINDS, "temporal")

    @checked(own=("layers",))
    def __init__(self, scale: float, layers: Sequence[int] | None, **options: Any) -> None:
        super().__init__(scale, **options)
        self.layers = None
        if layers is not None:
            if not isinstance(layers, Sequence) or isinstance(layers, str):
                raise refusal(
                    f"{self.name}: layers", layers, "indices of blocks, such as [7, 8, 9]"
                )
            self.layers = tuple([whole(i, f"{self.name}: layers", 0) for i in layers])

    def attach(self, target: Any) -> None:
        super().attach(target)
        if self.given_sites is None and self.layers is not None:
            self.sites = sites_of_layers(self.name, target, self.layers)

    def block(self, call: BlockCall) -> None:
        call.skip(call.rows.where(branch=self.branch))


class SkipLayerGuidance(SkippedBlocks):
    """Skip-layer guidance, after the pipeline's own.

    scale: strength s, 2.8 for SD3.5 medium; 0 costs nothing.
    layers: the blocks that are passed by, counted from 0: (7, 8, 9) of its 24; on models with
        several lists of them those of `transformer_blocks`, as in diffusers.
    branch: name of the branch. sites: attention sites whose blocks are meant, in place of layers.
    start, stop: fractions of the schedule. paper: strictly inside them, as published: never in
        step 0, and not at all where stop is before the second step.

    Costs one further row beside each conditional one, in the window alone. Switch off the
    pipeline's own (`skip_guidance_layers` of SD3).
    """

    @checked(own=("layers",))
    def __init__(
        self,
        scale: float = 2.8,
        layers: Sequence[int] = (7, 8, 9),
        *,
        branch: str = "skipped",
        paper: bool = False,
        start: float = 0.01,
        stop: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(scale, layers, branch=branch, start=start, stop=stop, **options)
        self.paper = paper

    def active(self, clock: Clock) -> bool:
        if not self.paper:
            return super().active(clock)
        return clock.steps * self.start < clock.step < clock.steps * self.stop
