"""One-way flow between regions, by a low-rank bias on self-attention (SOW).

Pei et al., "SOW: Selective One-Way Diffusion" (arXiv 2411.19182), which extends Cyclic One-Way
diffusion by a modulation of attention between regions: scores raised between two regions let
content spread from one to the other, scores lowered keep a region intact. No formula is public;
here the queries n of a region R_j attend to the keys m of a region S_j with

    scores[n, m] + sum_j beta_j(t) R_j(n) S_j(m)          beta_j(t) = beta_j (1 - u)

u is the share of the editor's window that has passed. One channel of q and k carries each flow, so
no mask is formed. beta_j = -inf forbids the flow for the whole window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.clock import Window
from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.address.sites import Grid, Selector
from hookctl.arguments import checked, number
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError
from hookctl.loop.state import State
from hookctl.recipes.common.sites import grid_of, image_sites
from hookctl.run_state import RunState

Flow = tuple[str, str, float]
REST = "rest"  # what lies in no named region


class OneWayFlow(Editor):
    """Strengthen or cut the flow of content between regions.

        seed = (0.25, 0.25, 0.75, 0.75)
        OneWayFlow({"seed": seed}, [("rest", "seed", -4.0), ("seed", "rest", 1.0)])

    regions: which there are, by name; "rest" is what lies in none of them.
    flows: (from, to, strength): the queries of `to` look at the keys of `from` more (above 0) or
        less (below 0) by this much, in units of scores; -inf: not at all.
    anneal: let the strength fall linearly to 0 over the window, else it is constant.
    sites: self-attention to act in; start, stop: the window, in fractions of the schedule.

    Raises InputError for names of no region, for strengths that are not finite or -inf, and for a
    cut that leaves queries without any key.
    """

    _masks: RunState[dict[Any, tuple[Tensor, Tensor]]] = RunState(factory=dict)

    @checked(infinite=("flows",))
    def __init__(
        self,
        regions: Mapping[str, RegionLike],
        flows: Sequence[Flow],
        *,
        anneal: bool = True,
        sites: Selector = "self, joint",
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.regions: dict[str, Region] = {
            name: region_of(value, f"regions[{name!r}]") for name, value in regions.items()
        }
        if not self.regions or REST in self.regions:
            raise InputError(
                f"OneWayFlow: regions={list(self.regions)}; name at least one, and none {REST!r}, "
                "which is what lies in none of them"
            )
        self.flows = [self._flow(flow) for flow in flows]
        self.anneal, self.sites = anneal, sites
        self.start, self.stop = start, stop
        self._window = Window.of((start, stop), "OneWayFlow: start, stop")

    def _flow(self, flow: Flow) -> Flow:
        known = [*self.regions, REST]
        if not isinstance(flow, Sequence) or len(flow) != 3 or not set(flow[:2]) <= set(known):
            raise InputError(
                f"OneWayFlow: flow {flow!r}; give (from, to, strength) with names of "
                f"{', '.join(known)}"
            )
        wanted, name = "a finite strength, or -inf to cut", f"OneWayFlow: strength of {flow!r}"
        return (flow[0], flow[1], number(flow[2], name, also=(-math.inf,), wanted=wanted))

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        image_sites(self.name, target, self.sites)

    def begin(self, state: State) -> None:
        self._masks.clear()

    def attention(self, call: AttentionCall) -> None:
        grid, left = grid_of(call, self.name), self._strength_left(call)
        finite = [flow for flow in self.flows if math.isfinite(flow[2]) and flow[2] * left]
        if finite:
            queries, keys = self._factors(finite, call, grid)
            strengths = queries.new_tensor([flow[2] * left for flow in finite])
            call.bias(list(call.rows), query_factors=queries * strengths, key_factors=keys)
        cuts = [flow for flow in self.flows if flow[2] == -math.inf]
        if cuts:
            self._check_cuts(cuts, call, grid)
        for flow in cuts:
            call.restrict(list(call.rows), *self._cut(flow, call, grid))

    def _strength_left(self, call: AttentionCall) -> float:
        """Which share of the strength is left at this step."""
        if not self.anneal:
            return 1.0
        passed = (call.clock.fraction - self._window.start) / (
            self._window.stop - self._window.start
        )
        return min(max(1.0 - passed, 0.0), 1.0)

    def _factors(self, flows: list[Flow], call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor]:
        """R [queries, flows] and S [keys, flows], 0 or 1; the text of a joint site is in none."""
        key = (tuple(flows), grid, call.q.shape[-2], call.k.shape[-2])
        if key not in self._masks:
            sources, targets = [flow[0] for flow in flows], [flow[1] for flow in flows]
            sides = (
                (targets, call.q.shape[-2], call.spans.image_queries),
                (sources, call.k.shape[-2], call.spans.image_keys),
            )
            queries, keys = (
                torch.stack([self._tokens(name, grid, tokens, span) for name in names], -1)
                for names, tokens, span in sides
            )
            self._masks[key] = queries, keys
        return self._masks[key]

    def _cut(self, flow: Flow, call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor]:
        """Regions as bit sets, [queries] and [keys]: the queries of the flow's target see only keys
        outside of its source, all others see all."""
        key = (flow, grid, call.q.shape[-2], call.k.shape[-2])
        if key not in self._masks:
            queries, keys = self._factors([(flow[0], flow[1], 1.0)], call, grid)
            self._masks[key] = (
                torch.where(queries[:, 0] > 0, 1, 3),
                torch.where(keys[:, 0] > 0, 2, 1),
            )
        return self._masks[key]

    def _check_cuts(self, cuts: list[Flow], call: AttentionCall, grid: Grid) -> None:
        """InputError if cuts leave queries, which may be the target of several, without any key."""
        key = ("checked", grid, call.q.shape[-2], call.k.shape[-2])
        if key in self._masks:
            return
        queries, keys = self._masks[key] = self._factors(cuts, call, grid)
        for cut in queries.unique(dim=0).bool():
            if bool(keys[:, cut].any(1).all()):
                told = [flow for flow, one in zip(cuts, cut.tolist(), strict=True) if one]
                raise InputError(
                    f"OneWayFlow: flow {', '.join(map(repr, told))} leaves queries without any "
                    "key; give a strength that is finite"
                )

    def _tokens(self, name: str, grid: Grid, tokens: int, span: tuple[int, int] | None) -> Tensor:
        """Which of so many tokens lie in a region, 0 or 1, [tokens]; span: of the image's."""
        start, stop = span or (0, tokens)
        inside = self._cells(name, grid).float().repeat(grid.frames)
        return F.pad(inside, (start, tokens - stop))

    def _cells(self, name: str, grid: Grid) -> Tensor:
        """Which cells of a frame lie in a region, bool [height * width]."""
        if name != REST:
            return self.regions[name].tokens(grid.height, grid.width)
        named = [region.tokens(grid.height, grid.width) for region in self.regions.values()]
        return ~torch.stack(named).any(0)
