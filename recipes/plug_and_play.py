"""Plug-and-Play: another look for the same image, whose layout is injected as features.

Tumanyan et al., "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation",
arXiv 2211.12572 (CVPR 2023). The source, mostly an inverted image, is drawn beside its edits. With
f the residual branch of one decoder block (layer 4 of 0 to 11 in Stable Diffusion) and q, k of the
self-attention of that layer and the finer ones, an edit has

    f_e <- f_s              in the first 0.8 of the schedule
    q_e, k_e <- q_s, k_s    in the first half: softmax(q_s k_s^T) v_e

The features hold what stands where, the maps which places are alike; the values stay the edit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from hookctl.address.clock import Window
from hookctl.address.families import denoiser_of
from hookctl.address.rows import UNCOND, Row, Rows
from hookctl.address.sites import Selector, Site, matcher
from hookctl.arguments import checked, whole
from hookctl.attention.call import AttentionCall
from hookctl.editor import Claim
from hookctl.hooks.skips import Concat
from hookctl.loop.state import Proceed, State
from hookctl.recipes.common.features.residual_branches import decoder_block, given_residuals
from hookctl.recipes.common.real_images.pinned import Path, Pinned
from hookctl.recipes.common.sites import image_sites
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from hookctl.run_state import RunState

COARSE = Fraction(1, 4)  # resolution of the layer whose features are injected


class PlugAndPlay(SourceAndEdits):
    """Draw an image anew in other words, everything where it is.

        inverted = DirectInversion(pipe, image, "a red circle above a blue square").run()
        edit = PlugAndPlay([inverted.prompt, "a green star above a blue square"])
        again, edited = inverted.edit(pipe, edit)

    prompts: the source, then its edits. An inversion without words, as in the paper, has "".
    feature_stop: fraction of the schedule up to which features are injected; query_stop: likewise
        queries and keys.
    layer: residual block of the decoder whose branch is injected, from 0, the coarsest; None for
        the second at a quarter of the latent's side, which is the published one.
    sites: self-attention whose queries and keys are injected; None for those of the decoder from
        that block on.
    path: latents of the source at every level, noisiest first, as those of an inversion
        (`loop.inversion`).
    paper: take the features of the source's unconditional row for both branches. In the official
        code the source is drawn by the empty text alone, beside the two rows of an edit, so give no
        negative prompt.

    For UNets. Raises InputError for a layer that there is not, UnsupportedError for other models.
    """

    _block: RunState[Concat] = RunState()
    _paths: RunState[frozenset[str]] = RunState()

    @checked(own=("prompts",))
    def __init__(
        self,
        prompts: Sequence[str],
        *,
        feature_stop: float = 0.8,
        query_stop: float = 0.5,
        layer: int | None = None,
        sites: Selector = None,
        path: Path | None = None,
        paper: bool = False,
    ) -> None:
        super().__init__(prompts)
        self.feature_window = Window.of((0.0, feature_stop), "PlugAndPlay: feature_stop")
        self.query_window = Window.of((0.0, query_stop), "PlugAndPlay: query_stop")
        self.layer = None if layer is None else whole(layer, "PlugAndPlay: layer")
        self.injected, self.paper = sites, paper
        self.sites = "self up" if sites is None else sites
        self.pin = None if path is None else Pinned(self.name, path, shared_start=True)
        if self.pin is None:
            self.stop = max(feature_stop, query_stop)

    # -- before anything runs ------------------------------------------------------------------

    def neutral(self) -> bool:
        return self.feature_window.stop == self.query_window.stop == 0

    def claims(self) -> Sequence[Claim]:
        edits, found = tuple(self.edits), []
        if self.query_window.stop:
            found.append(Claim("substitution", self.sites, self.query_window, edits))
        if self.feature_window.stop:
            found.append(Claim("features of the decoder", None, self.feature_window, edits))
        return found

    def attach(self, target: Any) -> None:
        self._block = decoder_block(self.name, denoiser_of(target), self.layer, COARSE)
        sites = image_sites(self.name, target, self.sites, ("self",))
        chosen = matcher(self._after_block) if self.injected is None else matcher(self.sites)
        self._paths = frozenset(site.path for site in sites if chosen(site))

    def _after_block(self, site: Site) -> bool:
        """Whether a site of the decoder runs after the block."""
        _, block, _, place, *_ = site.path.split(".")  # up_blocks.1.attentions.2 ...
        return (int(block), int(place)) >= (self._block.block, self._block.place)

    def begin(self, state: State) -> None:
        super().begin(state)
        if self.pin is not None:
            self.pin.begin(state)

    def before(self, state: State) -> None:
        if self.pin is not None:
            self.pin.before(state)

    # -- injection -----------------------------------------------------------------------------

    def denoise(self, state: State, proceed: Proceed) -> Any:
        if not self.feature_window.holds(state.clock):
            return proceed()
        sources = {row.index: source.index for row, source in self._injections(state.rows)}
        with given_residuals(self._block.module, len(state.rows), sources):
            return proceed()

    def attention(self, call: AttentionCall) -> None:
        if call.site.path in self._paths and self.query_window.holds(call.clock):
            for row, source in self._injections(call.rows):
                call.borrow(row, q=source, k=source)

    def _injections(self, rows: Rows) -> list[tuple[Row, Row]]:
        """(row of an edit, the source's row that it is given features of)"""
        pairs = self.paired(rows)
        if self.paper and rows.where(branch=UNCOND):
            return [(row, rows.twin(source, branch=UNCOND)) for row, source in pairs]
        return pairs
