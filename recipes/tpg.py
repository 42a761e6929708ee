"""TPG: guidance away from a prediction whose tokens were shuffled.

Rajabi et al., "Token Perturbation Guidance for Diffusion Models", arXiv 2506.10036. In the
perturbed rows each chosen block is given the image's tokens in another order, drawn anew for every
block and call and never undone; the norms stay, the structure does not:

    v = u + g (c - u) + s (c - p)               c + s (c - p) without g
"""

from __future__ import annotations

from typing import Any

import torch

from hookctl.address import families
from hookctl.arguments import checked, whole
from hookctl.errors import UnsupportedError
from hookctl.loop.inserting import BlockCall
from hookctl.loop.state import State
from hookctl.recipes.common.perturbed_guidance import PerturbedGuidance
from hookctl.recipes.common.sites import IMAGE_KINDS, sites_of
from hookctl.run_state import RunState


class TPG(PerturbedGuidance):
    """Token perturbation guidance, after the pipeline's own.

    scale: s, 3 as published; 0 costs nothing. seed: of the orders, which are the same in every run.
    branch: name of the branch. sites: attention sites whose blocks are given shuffled tokens; None:
        the last three quarters of the blocks of a UNet's encoder (6 to 23 of SDXL's, as published),
        of a transformer those of its first half.
    start, stop: fractions of the schedule.

    Costs one further row beside each conditional one. The published code draws from the global
    random state. In a sequence of text and image the text stays; positions stay with their places.
    Raises UnsupportedError for blocks in which the image's tokens can't be told.
    """

    _orders: RunState[torch.Generator] = RunState(factory=torch.Generator)

    @checked()
    def __init__(
        self, scale: float = 3.0, *, seed: int = 0, branch: str = "shuffled", **options: Any
    ) -> None:
        super().__init__(scale, branch=branch, **options)
        self.seed = whole(seed, "TPG: seed", 0)

    def attach(self, target: Any) -> None:
        super().attach(target)
        if self.given_sites is None:
            self.sites = _published(target)

    def begin(self, state: State) -> None:
        self._orders = torch.Generator().manual_seed(self.seed)

    def block(self, call: BlockCall) -> None:
        rows = call.rows.where(branch=self.branch)
        if not rows:
            return
        if call.image is None:
            raise UnsupportedError(
                f"TPG shuffles the image's tokens, and where they stand in what {call.name} is "
                "given isn't known; leave it out with sites="
            )
        start, stop = call.image
        order = start + torch.randperm(stop - start, generator=self._orders)
        at = call.places(rows)
        changed = call.hidden.clone()
        changed[at, start:stop] = changed[at][:, order.to(changed.device)]
        call.hidden = changed


def _published(target: Any) -> list[str]:
    """The sites of the blocks that are shuffled where none are given."""
    found: list[str] = []
    for name, model in families.denoisers_of(target):
        sites = [site for site in sites_of(model) if site.kind in IMAGE_KINDS]
        blocks = families.blocks_of(families.uncompiled(model), sites).values()
        encoder = [block.site.path for block in blocks if block.site.place == "down"]
        every = [block.site.path for block in blocks]
        chosen = encoder[len(encoder) // 4 :] if encoder else every[: -(-len(every) // 2)]
        found += [f"{name}.{path}" if name else path for path in chosen]
    return found
