"""LEDITS++: several edits of a real image at once, each where it acts of itself.

Brack et al., "LEDITS++: Limitless Image Editing using Text-to-Image Models", arXiv 2311.16711 (CVPR
2024). The image is inverted with the noise of every step (`EditFriendlyDDPM`, also of second-order
SDE-DPM-Solver++) and drawn again, while the text of every edit guides where its own masks are:

    eps = eps_0 + sum_i M1_i M2_i s_i (eps_i - eps_u)

M1 is where the words of the edit are looked at, M2 where its guidance is strongest; s < 0 takes the
thing away. eps_0 is what draws the image again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hookctl.address.pipelines import is_guided
from hookctl.address.regions import RegionLike
from hookctl.address.rows import UNCOND
from hookctl.address.sites import Selector
from hookctl.arguments import checked, for_each, is_list, is_text, number, refusal
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim
from hookctl.loop.branches import Branch
from hookctl.loop.prompts import EncodedTexts, check_texts
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common.added_guidance import with_added
from hookctl.recipes.common.implicit_masks import ImplicitMasks
from hookctl.recipes.common.prompt_texts import PromptTexts
from hookctl.recipes.common.sites import text_sites
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from hookctl.run_state import RunState

WORDS_ALONE = 800  # timesteps; before that M1 alone counts
EMPTY = "no edit"  # branch of the empty text, where the run has none
COARSE = Fraction(1, 4)  # of the latent's side: the published maps


class LEDITSPlusPlus(SourceAndEdits):
    """Change things in a real image by texts that guide it.

        inverted = EditFriendlyDDPM(pipe, image, "", steps=50, skip=0.15).run()
        again, edited = inverted.edit(pipe, LEDITSPlusPlus(["green circle", "blue square"]))

    edits: texts of what is to be there; scale: s of all, or of each; below 0 it is taken away.
    prompts: of the source and of what is edited, mostly twice what the image was inverted as. Where
        that isn't empty, give the inversion's own guidance=, so that eps_0 draws the image again.
    threshold: share of the image that an edit leaves alone, of all, or of each.
    masks: "both" (M2 from timestep 800 of 1000 on), "words" (M1), "guidance" (M2) or "none".
    region: where edits may act at all. sites: whose maps count.
    start, stop: fractions of the schedule.
    paper: maps of a quarter of the latent's side outside of the middle block, and eps_0 = eps_u
        whatever the prompt, as the official code has them.

    Costs a row for each edit, image and prompt, and one more without guidance. A pooled embedding
    beside the text (SDXL) stays the prompt's own.
    """

    _texts: RunState[PromptTexts] = RunState()
    _encoded: RunState[EncodedTexts] = RunState()

    @checked(own=("prompts", "edits"))
    def __init__(
        self,
        edits: Sequence[str],
        *,
        prompts: Sequence[str] = ("", ""),
        scale: float | Sequence[float] = 5.0,
        threshold: float | Sequence[float] = 0.9,
        masks: str = "both",
        region: RegionLike | None = None,
        sites: Selector = "cross down, cross up, cross blocks, joint",
        start: float = 0.0,
        stop: float = 1.0,
        paper: bool = False,
    ) -> None:
        super().__init__(prompts)
        self.texts = list(edits) if is_list(edits) else []
        if not self.texts or not all(is_text(one) and one.strip() for one in self.texts):
            raise refusal("LEDITSPlusPlus: edits", edits, "one text or more, as a list")
        self.scales = self._each(scale, "scale")
        self.thresholds = self._each(threshold, "threshold", low=0, below=1)
        # Branch -> which edit it is.
        self.acting = {f"edit {i}": i for i, s in enumerate(self.scales) if s}
        self.masks = ImplicitMasks(self.name, masks, region)
        self.sites, self.start, self.stop, self.paper = sites, start, stop, paper

    def _each(self, value: Any, name: str, **bounds: Any) -> list[float]:
        """A number for each edit."""
        name = f"LEDITSPlusPlus: {name}"
        each = for_each(value, name, len(self.texts), "edits", is_one=not is_list(value))
        return [number(one, name, **bounds) for one in each]

    def neutral(self) -> bool:
        return not self.acting

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)] if self.acting else []

    def attach(self, target: Any) -> None:
        text_sites(self.name, target, self.sites)
        check_texts(target, self.texts, self.name)
        self._texts = PromptTexts(target, self.texts)

    def begin(self, state: State) -> None:
        super().begin(state)
        if self.acting:
            self._encoded = EncodedTexts(state, [*self.texts, ""])
            self._encoded.check_fit(state, self.name)
            sites = text_sites(self.name, state.pipe, self.sites)
            self.masks.begin(sites, state, COARSE if self.paper else None)

    def branches(self, state: State) -> Mapping[str, Branch]:
        if not self.acting or not self.active(state.clock):
            return {}
        texts = {name: self.texts[i] for name, i in self.acting.items()}
        # Where guidance takes two calls the other one is asked for the negative prompt.
        if not state.rows.where(branch=UNCOND) and not is_guided(state.pipe):
            texts[EMPTY] = ""
        return {name: self._encoded.branch(text) for name, text in texts.items()}

    def attention(self, call: AttentionCall) -> None:
        start, stop = call.spans.text_keys or (0, 0)
        texts = self._texts.read(stop - start) if stop else []
        for row in call.rows if texts else ():
            if row.branch in self.acting and row.prompt in self.edits:
                self.masks.read(call, row, texts[self.acting[row.branch]])

    def combine(self, predictions: Predictions) -> Tensor:
        state, guided = predictions.state, predictions.guided
        if not self.acting or not self.active(state.clock):
            return guided
        uncond = predictions[UNCOND if UNCOND in predictions.branches else EMPTY]
        late = state.clock.timestep <= WORDS_ALONE
        added = torch.zeros_like(guided)
        for row in (row for row in state.images if row.prompt in self.edits):
            at = row.index
            for name, i in self.acting.items():
                d = self.scales[i] * (predictions[name][at] - uncond[at])
                key = (name, row.prompt, row.image)
                added[at] += self.masks.masked(d, key, self.thresholds[i], state, late)
            if self.paper:
                added[at] += uncond[at] - guided[at]
        return with_added(predictions, added)
