"""Masked self-attention: instances do not look at one another.

Wang et al., "InstanceDiffusion: Instance-level Control for Image Generation", arXiv 2402.03290
(CVPR 2024), section 3.2: among image tokens,

    n sees m   iff   n and m lie in a common region

which keeps attributes from leaking between instances. There it acts inside the trained fusers;
here on the ordinary self-attention of any model, and between the image tokens of a joint sequence
(text is seen by all and sees all). Tokens in no region form the background.

`paper=True` does what the official code does: only the finest sites, and each background token
sees itself alone (its comment says that objects see the background; its code does not allow it).
One thing is not reproduced: there, boxes are filled as mask[x0:x1, y0:y1] over tokens laid out in
rows, so every mask is transposed; and the shipped configurations switch the whole thing off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address import per_prompt
from hookctl.address.per_prompt import Regions
from hookctl.address.regions import BACKGROUND, BITS, bit_sets
from hookctl.address.sites import Grid, Selector, select
from hookctl.arguments import checked, one_of
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.state import State
from hookctl.recipes.common.sites import IMAGE_KINDS, grid_of, image_sites, sites_of
from hookctl.run_state import RunState

MOST_REGIONS = BITS - 1  # the last bit is the background's
BACKGROUNDS = ("background", "all", "itself")
IMAGE_SITES = ", ".join(IMAGE_KINDS)


class MaskedSelfAttention(Editor):
    """Let image tokens see only tokens of a region that they share.

    regions: for every prompt, or a list of lists, one for each prompt (as `RegionalPrompts`).
    background: what a token in no region sees: "background", "all" of the image, or "itself".
    open: instances see the background as well, so that only instances are cut off from each other.
    paper: the official code's form (see above). sites: self- and joint attention to act in; start,
    stop: fractions of the schedule.

    Rows of every branch are masked alike. No regions, or one that covers everything, leaves a run
    bit for bit as it was. Raises UnsupportedError at sites where the image does not attend to
    itself, and for background="itself" on joint sites.
    """

    sites: RunState[Selector] = RunState(None)
    _bits: RunState[dict[Any, tuple[Tensor, Tensor, Tensor | None]]] = RunState(factory=dict)

    @checked(own=("regions",))
    def __init__(
        self,
        regions: Regions,
        *,
        background: Literal["background", "all", "itself"] | None = None,
        open: bool | None = None,
        paper: bool = False,
        sites: Selector = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.regions = per_prompt.regions(regions, f"{self.name}: regions")
        if self.regions.longest > MOST_REGIONS:
            given, fit = self.regions.longest, MOST_REGIONS
            raise InputError(f"{self.name}: {given} regions of a prompt; give at most {fit}")
        if background is not None:
            one_of(background, f"{self.name}: background", BACKGROUNDS)
        self.background = background or ("itself" if paper else "background")
        self.open = open is True
        self.paper, self.given_sites = paper, sites
        self.sites = IMAGE_SITES if sites is None else sites
        self.start, self.stop = start, stop

    def neutral(self) -> bool | None:
        return None if self.regions.longest else True  # a region may hold everything

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        if self.given_sites is None and self.paper:
            found = select(sites_of(target), IMAGE_SITES, who=self.name)
            finest = max((s.resolution for s in found if s.resolution is not None), default=None)
            self.sites = IMAGE_SITES if finest is None else f"self @{finest}, joint @{finest}"
        chosen = image_sites(self.name, target, self.sites)
        if self.background == "itself" and any(site.kind == "joint" for site in chosen):
            raise UnsupportedError(
                f"{self.name}: background='itself' would cut the background of a joint sequence "
                "off from the text; give 'background' or 'all'"
            )

    def begin(self, state: State) -> None:
        self.regions.check_prompts(state.rows)

    def attention(self, call: AttentionCall) -> None:
        grid = grid_of(call, self.name)
        start, stop = call.spans.image_queries
        around = (start, call.q.shape[-2] - stop)
        for row in call.rows:
            if self.regions[row.prompt]:
                queries, keys, alone = self.bits(row.prompt, grid, around)
                call.restrict(row, queries, keys)
                if alone is not None:
                    call.skip(row, where=alone)

    def bits(
        self, prompt: int, grid: Grid, around: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Regions of queries and of keys as bit sets [N], and which tokens see only themselves.

        around: how many tokens of text stand before and after the image's.
        """
        key = (prompt, grid, around)
        if key not in self._bits:
            self._bits[key] = self._computed_bits(prompt, grid, around)
        return self._bits[key]

    def _computed_bits(
        self, prompt: int, grid: Grid, around: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        keys = bit_sets(self.regions[prompt], grid.height, grid.width).repeat(grid.frames)
        outside = keys == BACKGROUND
        queries = keys.clone()
        if self.open:
            queries |= BACKGROUND
        if self.background == "all":
            queries[outside] = -1
        # Text belongs to every region.
        queries, keys = (F.pad(bits, around, value=-1) for bits in (queries, keys))
        alone = None
        if self.background == "itself" and bool(outside.any()):
            alone = F.pad(outside.to(torch.float32), around)
        return queries, keys, alone
