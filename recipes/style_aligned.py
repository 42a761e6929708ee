"""StyleAligned: images in one style, by attending to the first of them.

Hertz et al., "Style Aligned Image Generation via Shared Attention", arXiv 2312.02133 (CVPR 2024).
In self-attention, with r the first prompt's row of the same branch,

    q~ = AdaIN(q, q_r),  k~ = AdaIN(k, k_r),  out = Attn(q~, [k~; s k_r], [v; v_r]; [0; b])

AdaIN gives q and k the reference's mean and deviation, per head and channel over the tokens. The
reference sees itself alone: a duplicate of its own keys would change nothing, whatever the shift b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hookctl.address.clock import Window
from hookctl.address.families import denoiser_of
from hookctl.address.rows import Row
from hookctl.address.sites import Selector
from hookctl.arguments import checked, number
from hookctl.attention.call import AttentionCall
from hookctl.editor import Claim
from hookctl.errors import UnsupportedError
from hookctl.evaluate.gather import rows_of
from hookctl.loop.state import Proceed, State
from hookctl.recipes.common.features.group_norms import shared_group_norms
from hookctl.recipes.common.features.statistics import adain
from hookctl.recipes.common.image_tokens import image_keys, with_image
from hookctl.recipes.common.real_images.pinned import Path, Pinned
from hookctl.recipes.common.sites import image_sites
from hookctl.recipes.common.source_and_edits import SourceAndEdits


class StyleAligned(SourceAndEdits):
    """Draw a set of prompts in the style of the first.

        edit = StyleAligned(["a striped red star", "a striped red circle"])
        images = edit.run(pipe, seed=0)

    prompts: the first one's image is the reference; a single prompt is drawn as without the editor.
    adain: align queries and keys. share: let the others attend to the reference.
    shift: b, added to the scores of the reference's keys: ln 2 for a given image, -inf to share
        nothing. scale: s, factor of the reference's keys.
    group_norm: normalise the features together with the reference's, as the paper's transfer of an
        image does. (Sharing layer norms, an option of the official code, changes nothing: they are
        per token.)
    sites: self-attention to act in. On a joint site the image's tokens are aligned and shared.
    path: latents of the reference at every level, noisiest first: those of an inverted image
        (`loop.inversion`), which the first prompt then draws.
    paper: take the path's level 5 in the first step and none before 6 later, so that the reference
        is a little cleaner than the others at the start, and the last one after the last step, as
        the official code does.
    """

    least = 1
    one_noise = False

    @checked(infinite=("shift",), own=("prompts",))
    def __init__(
        self,
        prompts: Sequence[str],
        *,
        adain: bool = True,
        share: bool = True,
        shift: float = 0.0,
        scale: float = 1.0,
        group_norm: bool = False,
        sites: Selector = "self, joint",
        start: float = 0.0,
        stop: float = 1.0,
        path: Path | None = None,
        paper: bool = False,
    ) -> None:
        super().__init__(prompts)
        wanted = "a number, such as ln 2 = 0.69, or -inf"
        self.shift = number(shift, f"{self.name}: shift", also=(-math.inf,), wanted=wanted)
        self.scale = number(scale, f"{self.name}: scale")
        self.acts = Window.of((start, stop), f"{self.name}: start, stop")
        self.align, self.share = bool(adain), share and shift != -math.inf
        self.group_norm, self.sites, self.paper = group_norm, sites, paper
        self.shares: dict[str, float] = {}  # branch -> weight of the extended form, 1 by default
        self.pin = None if path is None else Pinned(self.name, path, first_level=5 if paper else 0)
        if self.pin is None:
            self.start, self.stop = start, stop

    # -- before anything runs ------------------------------------------------------------------

    def neutral(self) -> bool:
        shares = self.share or self.align or self.group_norm
        return (not shares or self.acts.start >= self.acts.stop) and self.pin is None

    def claims(self) -> Sequence[Claim]:
        if not self.align or self.acts.start >= self.acts.stop:
            return ()
        return [Claim("substitution", self.sites, self.acts, tuple(self.edits))]

    def attach(self, target: Any) -> None:
        image_sites(self.name, target, self.sites)
        model = denoiser_of(target)
        norms = any(isinstance(m, nn.GroupNorm) for m in model.modules())
        if self.group_norm and not norms:
            raise UnsupportedError(
                f"{self.name}: {type(model).__name__} has no group norms; leave group_norm out"
            )

    def begin(self, state: State) -> None:
        super().begin(state)
        if self.pin is not None:
            self.pin.begin(state)

    def before(self, state: State) -> None:
        if self.pin is not None:
            self.pin.before(state)

    def after(self, state: State) -> None:
        last = state.clock.steps - 1
        if self.pin is not None and self.paper and state.clock.step == last:
            level = max(last + 1, self.pin.first_level + 1)
            if level < len(self.pin.path):
                self.pin.set(state, level)

    # -- sharing -------------------------------------------------------------------------------

    def denoise(self, state: State, proceed: Proceed) -> Any:
        if not self.group_norm or not self.acts.holds(state.clock):
            return proceed()
        sources = {row.index: source.index for row, source in self.paired(state.rows)}
        with shared_group_norms(state.denoiser, len(state.rows), sources):
            return proceed()

    def attention(self, call: AttentionCall) -> None:
        pairs = self.paired(call.rows) if self.acts.holds(call.clock) else []
        if pairs and self.align:
            rows, sources = ([row.index for row in side] for side in zip(*pairs, strict=True))
            q, k = (_aligned(x, rows, sources, call) for x in (call.q, call.k))
            call.replace(rows, q=q, k=k)
        by_source: dict[Row, list[Row]] = {}
        for row, source in pairs if self.share else ():
            by_source.setdefault(source, []).append(row)
        for source, others in by_source.items():
            self.extend(call, others, source)

    def extend(self, call: AttentionCall, rows: list[Row], source: Row) -> None:
        """Let rows attend to the reference, which is the source row of their branch."""
        k: Any = source
        v: Any = source
        if call.site.kind == "joint" or self.scale != 1.0:
            k, v = (image_keys(x[source.index], call) for x in (call.k, call.v))
            k = k * self.scale
        share = self.shares.get(source.branch, 1.0)
        call.extend(rows, k, v, shift=self.shift or None, share=share)


def _aligned(x: Tensor, rows: list[int], sources: list[int], call: AttentionCall) -> Tensor:
    """Rows of q or k with their sources' statistics over the image's tokens."""
    own, reference = rows_of(x, rows), rows_of(x, sources)
    span = call.spans.image_queries if x is call.q else call.spans.image_keys
    part = slice(*span) if span else slice(None)
    return with_image(own, adain(own[..., part, :], reference[..., part, :]), span)
