"""`References`: how much each reference image of an edit model counts, where, and which part of it.

Edit models (FLUX Kontext, FLUX.2 klein, Qwen-Image-Edit) hold the images that they are given in one
sequence with the one that is drawn. With r(m) the reference of key m, the attention that others pay
to it becomes

    exp(s_nm)  ->  w_r c_r(n) a_r(m) exp(s_nm)

w_r: its weight, as a bias ln w_r of its keys (diffusers discussion 10025); c_r: whether the place
of query n lies in the region of the target that may see it; a_r: whether key m lies in its mask.
A reference's own tokens look at themselves as before. No mask of N x M is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from hookctl.address.families import sites_of
from hookctl.address.pipelines import is_guided
from hookctl.address.references import check_references, reference_index, reference_name
from hookctl.address.regions import Region, RegionLike, bit, region_of
from hookctl.address.rows import COND, UNCOND
from hookctl.address.sites import Selector, select
from hookctl.arguments import checked, is_list, number, one_of, refusal
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.state import State
from hookctl.run_state import RunState

T = TypeVar("T")

MOST = 31  # two bits for each reference, one for all others
Key = tuple[int, int, tuple[Any, ...]]


class References(Editor):
    """Weigh reference images, keep them to a region, show a part of them.

        edit = References({0: 0.5}, regions={1: "box:0,0,0.5,1"})
        with hookctl.control(pipe, edit):
            image = pipe(prompt="the cat in the hat", image=[cat, hat]).images[0]

    weights: of the references by number or name (`{"references[0]": 0.5}`), or a list with one for
        each; 1 as it is, 0 not seen at all, above 1 more than the model would.
    regions: in which part of the drawn image a reference may be seen, by number, name or in a list
        (None: everywhere); a `hookctl.Region`, a box (x0, y0, x1, y1), a mask, or a text such as
        "box:0,0,0.5,1".
    masks: which part of a reference may be seen, in fractions of its own width and height.
    branch: rows of this branch alone, COND or UNCOND; None: of all. A pipeline's unconditional rows
        see the references too; hidden from these alone (weight 0), guidance is towards them.
    sites: self- and joint attention to act in; start, stop: fractions of the schedule.

    Words of the prompt and other references see a reference by its weight and mask, whatever its
    region. Weights of 1 alone leave a run bit for bit as it was. Raises InputError, before
    denoising, for a reference beyond those that the run has; UnsupportedError for a pipeline that
    keeps the keys of its references from its first step on.
    """

    _factors: RunState[dict[Key, tuple[Tensor, Tensor] | None]] = RunState(factory=dict)
    _bits: RunState[dict[Key, tuple[Tensor, Tensor] | None]] = RunState(factory=dict)

    @checked(own=("weights", "regions", "masks"))
    def __init__(
        self,
        weights: Mapping[int | str, float] | Sequence[float] = (),
        *,
        regions: Mapping[int | str, RegionLike] | Sequence[RegionLike | None] = (),
        masks: Mapping[int | str, RegionLike] | Sequence[RegionLike | None] = (),
        branch: str | None = None,
        sites: Selector = "self, joint",
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        number_of = partial(number, low=0, wanted="a number of 0 or more")
        weighed = _by_index(weights, f"{self.name}: weights", number_of)
        self.weights = {index: weight for index, weight in weighed.items() if weight != 1}
        self.regions: dict[int, Region] = _by_index(regions, f"{self.name}: regions", region_of)
        self.masks: dict[int, Region] = _by_index(masks, f"{self.name}: masks", region_of)
        if branch is not None:
            one_of(branch, f"{self.name}: branch", (COND, UNCOND))
        self.branch, self.sites, self.start, self.stop = branch, sites, start, stop
        self._named = sorted({*weighed, *self.regions, *self.masks})
        self._restricted = sorted(
            {*(i for i, w in self.weights.items() if not w), *self.regions, *self.masks}
        )
        if len(self._restricted) > MOST:
            given = len(self._restricted)
            raise InputError(f"{self.name}: {given} references hidden in part; at most {MOST} fit")

    def neutral(self) -> bool:
        return not (self.weights or self._restricted)

    def claims(self) -> Sequence[Claim]:
        if not self.regions:
            return ()
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        for site in select(sites_of(target), self.sites, who=self.name):
            if site.kind not in ("self", "joint"):
                raise InputError(
                    f"{self.name}: sites={self.sites!r} holds {site.path}, a {site.kind} site; "
                    "references are seen at self and joint sites"
                )

    def begin(self, state: State) -> None:
        self._factors, self._bits = {}, {}
        model = type(state.denoiser).__name__
        check_references(self.name, self._named, state.images_in_sequence, model)
        if state.kwargs.get("kv_cache_mode") is not None and not self.neutral():
            raise UnsupportedError(
                f"{self.name}: {type(state.pipe).__name__} keeps the keys of its references from "
                "its first step on, where they are out of reach; use Flux2KleinPipeline"
            )
        if self.branch == UNCOND and not self.neutral():
            self._check_guided(state)

    def _check_guided(self, state: State) -> None:
        if not state.rows.where(branch=UNCOND) and is_guided(state.pipe) is False:
            raise InputError(
                f"{self.name}: branch='uncond', but this run has no guidance and so no such rows; "
                "raise its guidance scale, or leave branch out"
            )

    def attention(self, call: AttentionCall) -> None:
        if self.neutral() or not call.references:
            return  # a site that the references do not pass (Z-Image's refiners)
        rows = list(call.rows if self.branch is None else call.rows.where(branch=self.branch))
        grid = call.require_grid(self.name) if self.regions else None
        key = (call.q.shape[-2], call.k.shape[-2], (*call.spans, grid))
        if key not in self._bits:
            self._factors[key] = self._biased(call)
            self._bits[key] = self._restrictions(call)
        if (factors := self._factors[key]) is not None:
            call.bias(rows, query_factors=factors[0], key_factors=factors[1])
        if (bits := self._bits[key]) is not None:
            call.restrict(rows, *bits)

    def _biased(self, call: AttentionCall) -> tuple[Tensor, Tensor] | None:
        """Of queries [N, r] and keys [M, r], for each weight: who sees it, and ln w of its keys."""
        weights = {i: w for i, w in self.weights.items() if w}
        if not weights:
            return None
        queries = torch.ones(call.q.shape[-2], len(weights))
        keys = torch.zeros(call.k.shape[-2], len(weights))
        for column, (index, weight) in enumerate(weights.items()):
            span = slice(*call.references[index].keys)
            keys[span, column] = math.log(weight)
            if len(queries) == len(keys):
                queries[span, column] = 0  # its own
        return queries, keys

    def _restrictions(self, call: AttentionCall) -> tuple[Tensor, Tensor] | None:
        """Bit sets of queries and keys: bit 0 is of all that is not hidden; of the i-th hidden
        reference, bit 2 i + 1 is of what may be seen of it and 2 i + 2 of the rest."""
        if not self._restricted:
            return None
        queries = torch.ones(call.q.shape[-2], dtype=torch.int64)
        keys = torch.ones(call.k.shape[-2], dtype=torch.int64)
        for i, index in enumerate(self._restricted):
            reference, (shown, hidden) = call.references[index], (bit(2 * i + 1), bit(2 * i + 2))
            span, grid = slice(*reference.keys), reference.grid
            seen = torch.ones(grid.tokens, dtype=torch.bool)
            if index in self.masks:
                seen = self.masks[index].tokens(grid.height, grid.width).repeat(grid.frames)
            keys[span] = torch.where(seen, shown, hidden)
            if self.weights.get(index, 1):
                queries |= self._seeing(call, index, shown)
            if len(queries) == len(keys):
                queries[span] |= shown | hidden  # its own
        return queries, keys

    def _seeing(self, call: AttentionCall, index: int, shown: int) -> Tensor:
        """The bit of a reference for the queries that may see it, [N]."""
        seeing = torch.full((call.q.shape[-2],), shown)
        if index in self.regions:
            grid, (start, stop) = call.require_grid(self.name), call.spans.image_queries
            inside = self.regions[index].tokens(grid.height, grid.width).repeat(grid.frames)
            seeing[start:stop] = torch.where(inside, shown, 0)
        return seeing


def _by_index(given: Any, name: str, read: Callable[[Any, str], T]) -> dict[int, T]:
    """What is said of references, by number."""
    if isinstance(given, Mapping):
        found = {}
        for key, value in given.items():
            index = reference_index(key) if isinstance(key, str) else key
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                wanted = "numbers from 0, or names such as 'references[0]', as keys"
                raise refusal(name, given, wanted)
            found[index] = read(value, f"{name}[{reference_name(index)!r}]")
        return found
    if not is_list(given):
        raise refusal(name, given, "a list with an entry for each reference, or a mapping")
    return {i: read(x, f"{name}[{i}]") for i, x in enumerate(given) if x is not None}
