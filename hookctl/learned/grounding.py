"""What GLIGEN and InstanceDiffusion share: gated self-attention over grounding tokens, attached.

In every transformer block, between the self-attention's residual and the cross-attention, image
tokens read grounding tokens (`modules.gated_attention`). Each row of a batch has the tokens of its
own prompt; a row without prompt (the unconditional one) has those of an empty layout, which are
learned. With the strength at 0 the layers are as if they were not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.clock import Clock
from hookctl.address.families import denoiser_of, sites_of, uncompiled
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Selector, Site, matcher, select
from hookctl.arguments import number, shown
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError
from hookctl.learned.modules.gated_attention import GatedSelfAttention
from hookctl.learned.weights import Weights
from hookctl.loop.inserting import InsertCall
from hookctl.loop.state import State
from hookctl.run_state import RunState

GATES = ("alpha_attn", "alpha_dense")
# The branch in which `MultiInstanceSampler` draws one instance alone.
_INSTANCE = re.compile(r"instance (\d+)")


@dataclass(frozen=True)
class Fade:
    """A strength over the schedule: 1 from `start` to `stop`, falling evenly to 0 over the share
    `decay` that follows, 1 again from `back` on; 0 elsewhere. All are fractions of the steps."""

    start: float = 0.0
    stop: float = 1.0
    decay: float = 0.0
    back: float = 1.0

    @property
    def end(self) -> float:
        """The fraction after which it is 0 for good."""
        return 1.0 if self.back < 1 else min(self.stop + self.decay, 1.0)

    def at(self, clock: Clock) -> float:
        """The strength of a step."""
        if not clock.steps:
            return 1.0 if self.start <= 0 < self.stop else 0.0
        start, stop, decay, back = (
            int(share * clock.steps + 1e-9)
            for share in (self.start, self.stop, self.decay, self.back)
        )
        step = clock.step
        if start <= step < stop or step >= back:
            return 1.0
        return max(0.0, 1 - (step - stop + 1) / decay) if step >= stop and decay else 0.0

    def check_steps(self, steps: int, name: str) -> None:
        """Raise InputError if it is 0 in all of so many steps: the shares are rounded down."""
        if steps and not any(self.at(Clock(step, steps, 0.0)) for step in range(steps)):
            raise InputError(
                f"{name}: start={self.start:g}, stop={self.stop:g} hold none of the run's {steps} "
                f"steps; give stop={self.start + 1 / steps:.2g} or more, or draw in more steps"
            )


@dataclass(frozen=True)
class Layout:
    """Whose tokens a row has: those of a prompt, or of one of its instances alone (`instance`);
    prompt None: of an empty layout."""

    prompt: int | None = None
    instance: int | None = None

    @classmethod
    def of(cls, row: Row) -> Layout:
        alone = _INSTANCE.fullmatch(row.branch)
        if alone:
            return cls(row.prompt, int(alone[1]))
        return cls(row.prompt) if row.role == COND else cls()


class Grounding(Editor):
    """Base of the editors that ground by tokens. A subclass gives `_tokens`.

    fusers: the layers, by the path of their transformer block. strength: of what they add, a number
    or one for each prompt. blocks: further factors by selectors of self-attention sites, such as
    {"up": 0.5}; where several match, all count. fade: over the schedule. sites: self-attention
    after which the layers act, None for all that have one.
    """

    _made: RunState[dict[Layout, Tensor]] = RunState(factory=dict)
    _batches: RunState[dict[Any, Tensor]] = RunState(factory=dict)

    def __init__(
        self,
        fusers: Mapping[str, GatedSelfAttention],
        *,
        strength: float | Sequence[float] = 1.0,
        blocks: Mapping[str, float] | None = None,
        fade: Fade = Fade(),
        sites: Selector = None,
    ) -> None:
        for share in ("decay", "back"):
            number(getattr(fade, share), f"{self.name}: {share}", low=0, high=1)
        if fade.stop + fade.decay > 1 + 1e-9 or fade.back < min(fade.stop + fade.decay, 1) - 1e-9:
            raise InputError(
                f"{self.name}: stop={fade.stop:g}, decay={fade.decay:g}, back={fade.back:g}; give "
                "stop + decay <= back <= 1, fractions of the schedule"
            )
        self.fusers = {path: Weights(layer, precise=GATES) for path, layer in fusers.items()}
        self._closed = {path for path, layer in fusers.items() if layer.closed}
        each = list(strength) if isinstance(strength, Sequence) else None
        self.strengths = [
            number(one, f"{self.name}: strength", low=0)
            for one in ([strength] if each is None else each)
        ]
        self._one_strength = each is None
        self._factors = [
            (matcher(where), number(factor, f"{self.name}: blocks[{where!r}]", low=0))
            for where, factor in (blocks or {}).items()
        ]
        self._selectors = list(blocks or {})
        self.fade = fade
        self.start, self.stop = fade.start, fade.end
        self._chosen = "self" if sites is None else sites
        self.sites = partial(_acts_at, matcher(self._chosen), frozenset(fusers))

    def neutral(self) -> bool | None:
        if not any(self.strengths) or self.fade.start >= self.fade.end:
            return True
        if len(self._closed) == len(self.fusers):
            return True
        return None if any(not factor for _, factor in self._factors) else False

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        """Check that the layers fit the blocks of a model."""
        modules = dict(uncompiled(denoiser_of(target)).named_modules())
        for path, weights in self.fusers.items():
            check_fit(path, weights.module, modules.get(path), f"{self.name}: {path}")
        every = sites_of(target)
        chosen = select(every, self._chosen, who=self.name)
        acting = [s for s in chosen if s.kind == "self" and block_of(s) in self.fusers]
        if every and not acting:
            raise InputError(
                f"{self.name}: sites={shown(self._chosen)} holds none of the self-attention that "
                f"the checkpoint has layers for: {', '.join(list(self.fusers)[:3])}, ..."
            )
        for selector in self._selectors:
            select(acting, selector, who=f"{self.name}: blocks")

    def begin(self, state: State) -> None:
        drawn = len({row.prompt for row in state.rows})
        if not self._one_strength and len(self.strengths) != drawn:
            raise InputError(
                f"{self.name}: strength has {len(self.strengths)} numbers, but the pipeline draws "
                f"{drawn} prompts; give one for all, or one for each"
            )
        if not Grounding.neutral(self):
            self.fade.check_steps(state.clock.steps, self.name)
        self._made, self._batches = {}, {}

    def insert(self, call: InsertCall) -> None:
        path = block_of(call.site)
        strengths = self._strengths(call)
        rows = [row for row in call.rows if strengths[row.index]]
        if not rows or path in self._closed:
            return
        repeats = call.hidden.shape[0] // len(call.rows)  # a video's row has one for each frame
        every = len(rows) == len(call.rows)
        places = [row.index * repeats + i for row in rows for i in range(repeats)]
        x = call.hidden if every else call.hidden[places]
        layer = self.fusers[path].like(x)
        gammas = [strengths[row.index] for row in rows for _ in range(repeats)]
        gamma = gammas[0] if len(set(gammas)) == 1 else torch.tensor(gammas)
        layouts = [Layout.of(row) for row in rows for _ in range(repeats)]
        y = layer(x, self._batch(layouts, x), gamma, self._mask(layouts, call))
        if every:
            call.hidden = y
        else:
            call.hidden = call.hidden.index_copy(0, torch.tensor(places, device=y.device), y)

    def _strengths(self, call: InsertCall) -> list[float]:
        """The strength of each row."""
        common = self.fade.at(call.clock)
        for test, factor in self._factors:
            if test(call.site):
                common *= factor
        each = self.strengths
        return [common * (each[0] if self._one_strength else each[r.prompt]) for r in call.rows]

    # -- tokens ----------------------------------------------------------------------------------

    def _tokens(self, layout: Layout, like: Tensor) -> Tensor:
        """Grounding tokens [M, D], on the device of `like` and as precise; made once a run."""
        raise NotImplementedError

    def _mask(self, layouts: Sequence[Layout], call: InsertCall) -> Tensor | None:
        """What image tokens may see, bool [rows, 1, N, N + M]; None for everything."""
        return None

    def _batch(self, layouts: Sequence[Layout], x: Tensor) -> Tensor:
        """The tokens of some rows, [rows, M, D], as x is."""
        key = tuple(layouts), x.device, x.dtype
        if key not in self._batches:
            wide = torch.promote_types(x.dtype, torch.float32)  # sines of large angles
            like = torch.empty(0, device=x.device, dtype=wide)
            for layout in layouts:
                if layout not in self._made:
                    with torch.no_grad():
                        self._made[layout] = self._tokens(layout, like)
            self._batches[key] = torch.stack([self._made[one] for one in layouts]).to(x.dtype)
        return self._batches[key]


def _acts_at(chosen: Callable[[Site], bool], blocks: Collection[str], site: Site) -> bool:
    return chosen(site) and block_of(site) in blocks


def block_of(site: Site) -> str:
    """The path of the transformer block in which an attention layer stands."""
    return site.path.rpartition(".")[0]


def check_fit(path: str, layer: GatedSelfAttention, block: nn.Module | None, who: str) -> None:
    """Raise InputError unless a layer fits a transformer block."""
    attention = getattr(block, "attn1", None)
    if attention is None:
        raise InputError(
            f"{who}: the model has no such transformer block; the checkpoint is for another model"
        )
    width, own = attention.to_q.in_features, layer.norm1.normalized_shape[0]
    if width != own:
        raise InputError(
            f"{who}: the layer is for {own} channels and the block has {width}; the checkpoint is "
            "for another model"
        )
    if attention.heads != layer.attn.heads:
        raise InputError(
            f"{who}: the layer has {layer.attn.heads} heads and the block {attention.heads}; give "
            "as many"
        )
