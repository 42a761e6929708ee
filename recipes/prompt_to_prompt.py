"""Prompt-to-Prompt: edit an image by editing its prompt.

Hertz et al., "Prompt-to-Prompt Image Editing with Cross-Attention Control", arXiv 2208.01626
(ICLR 2023). The source and its edits are drawn in one batch from one noise; in the conditional
rows, an edit takes over the source's attention for a part of the schedule:

    cross   A' = [(A_source T) a + A_edit (1 - a)] eq alpha + A_edit (1 - alpha)
    self    A' = A_source

T maps source tokens to target tokens, a flags aligned tokens, eq scales words, alpha is 1 while a
word is in its window. Both are sums of plain attention terms, so no map is formed:
A' V = Attn(q_s, k_s, T diag(a eq alpha) V) + Attn(q_e, k_e, diag((1-a) eq alpha + 1 - alpha) V).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from hookctl.address.clock import Window
from hookctl.address.latent import finest_within
from hookctl.address.rows import COND
from hookctl.address.sites import Selector, Site, matcher, select
from hookctl.address.text import PromptText
from hookctl.arguments import (
    checked,
    for_each,
    gains_for_each,
    number,
    one_of,
    pair,
    words_for_each,
)
from hookctl.attention.call import AttentionCall
from hookctl.editor import TEXTS, WHOLE_IMAGE, WORDS, Claim
from hookctl.errors import InputError
from hookctl.loop.state import State
from hookctl.recipes.common.local_blend import LocalBlend
from hookctl.recipes.common.prompt_texts import PromptTexts, require_word
from hookctl.recipes.common.sites import IMAGE_KINDS, TEXT_KINDS, sites_of
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from hookctl.recipes.common.token_routing import TokenRouting
from hookctl.recipes.common.word_windows import WindowLike, WordWindows, holds_officially
from hookctl.run_state import RunState

MODES = ("auto", "replace", "refine")
Words = str | Sequence[str] | None
CHECKED_HERE = (
    "prompts", "mode", "cross_replace", "self_replace", "self_resolution", "reweight",
    "reweight_window", "blend", "subtract", "blend_threshold",
)  # fmt: skip
Gains = Mapping[str, float]


class PromptToPrompt(SourceAndEdits):
    """Edit images by word swap, refinement and re-weighting, with local blend.

        edit = PromptToPrompt(["a red cat", "a red dog"], blend=("cat", "dog"))
        source, edited = edit.run(pipe, seed=0)

    or, with a pipeline call of your own, `with hookctl.control(pipe, edit):
    pipe(prompt=edit.prompts, generator=edit.generators(seed=0))`.

    prompts: the source, then its edits. A word is looked up in the prompt by its letters, whatever
        number of tokens it has; every occurrence counts. Where a pipeline has several encoders,
        prompt_2= and prompt_3= of its call must be left out; on Flux, prompts are prompt_2.
    mode: "replace" (as many words, swapped), "refine" (words added or left out), "auto" (replace
        where the word counts agree), or a list with one for each edit.
    cross_replace: until when the source's cross-attention is used: a fraction of the schedule, a
        pair, or {"default": ..., word of the edit: ...} for windows by word.
    self_replace: the same for self-attention, in the sites that hold the layout.
    self_resolution: the finest of these, as a fraction of the latent's sides; None: a quarter,
        where there are such.
    reweight: {word of the edit: gain}, any sign; for several edits a list, None where there is
        none.
    reweight_window: when that acts, fractions of the schedule; None: in the cross-attention window,
        as the official code does.
    blend: words whose places may change: one for all prompts, or a list with one entry for each
        prompt (a word, several, or None). subtract: words whose places may not. blend_start: from
        which fraction of the schedule on; blend_threshold: of the maps' maximum, from 0 to below 1,
        one number or a pair for `blend` and `subtract`.
    sites: where to act at all.
    paper: align tokens exactly as the official code does, its misalignment of unequal token
        counts included.

    After a run, `edit.local.mask(prompt, image)` is the last mask of the local blend.

    Raises InputError for arguments that do not fit the prompts; on entering `control`, WordError
    for words that their prompts do not have, AlignmentError for prompts that can't be replaced.
    """

    _texts: RunState[PromptTexts] = RunState()
    _image_sites: RunState[list[Site]] = RunState()
    _text_sites: RunState[list[Site]] = RunState()
    _routing: RunState[TokenRouting] = RunState()
    _layout_sites: RunState[set[str]] = RunState()

    @checked(own=CHECKED_HERE)
    def __init__(
        self,
        prompts: Sequence[str],
        *,
        mode: str | Sequence[str] = "auto",
        cross_replace: WindowLike | Mapping[str, WindowLike] = 0.8,
        self_replace: WindowLike = 0.4,
        self_resolution: float | None = None,
        reweight: Gains | Sequence[Gains | None] | None = None,
        reweight_window: WindowLike | None = None,
        blend: Words | Sequence[Words] = None,
        subtract: Words | Sequence[Words] = None,
        blend_start: float = 0.2,
        blend_threshold: float | tuple[float, float] = 0.3,
        sites: Selector = "self, cross, joint",
        paper: bool = False,
    ) -> None:
        super().__init__(prompts)
        edits, name = len(self.edits), self.name
        modes = for_each(mode, f"{name}: mode", edits, "edits", is_one=isinstance(mode, str))
        self.modes = [one_of(one, f"{name}: mode", MODES) for one in modes]
        self.cross = WordWindows.of(cross_replace, f"{name}: cross_replace")
        self.self_window = Window.of(self_replace, f"{name}: self_replace")
        self.self_resolution = None
        if self_resolution is not None:
            self.self_resolution = _resolution(self_resolution, f"{name}: self_resolution")
        self.shared_gains = isinstance(reweight, Mapping)
        self.gains = gains_for_each(reweight, f"{name}: reweight", edits)
        self.reweight_window = None
        if reweight_window is not None:
            self.reweight_window = Window.of(reweight_window, f"{name}: reweight_window")
        self.blend = words_for_each(blend, f"{name}: blend", len(self.prompts))
        self.subtract = words_for_each(subtract, f"{name}: subtract", len(self.prompts))
        if any(self.subtract) and not any(self.blend):
            raise InputError(
                f"{name}: subtract={subtract!r} takes places from blend=; give that too"
            )
        start = Window.of((blend_start, 1.0), f"{name}: blend_start").start
        thresholds = pair(
            blend_threshold,
            f"{name}: blend_threshold",
            partial(number, low=0, below=1),
            "a share of the maximum, from 0 to below 1, or two",
        )
        blends = any(self.blend)
        self.local = LocalBlend(self.blend, self.subtract, start, thresholds) if blends else None
        self.sites, self.paper = sites, paper

    @property
    def needs_words(self) -> bool:
        return True

    # -- before anything runs ------------------------------------------------------------------

    def neutral(self) -> bool:
        windows = (*self.cross.windows, self.self_window)
        acts = any(window.start < window.stop for window in windows)
        weighs = self.reweight_window is not None and any(self.gains)
        return not (acts or weighs) and self.local is None

    def claims(self) -> Sequence[Claim]:
        edits = tuple(self.edits)
        gain_windows = [self.reweight_window] if self.reweight_window and any(self.gains) else []
        windows = [w for w in (*self.cross.windows, *gain_windows) if w.start < w.stop]
        claims = [Claim(what, shared=True) for what in (WORDS, TEXTS)]
        if self.local is not None:
            claims.append(Claim(WHOLE_IMAGE, window=Window(self.local.start, 1.0), shared=True))
        if self.self_window.start < self.self_window.stop:
            sites = self._sites_of_kinds(IMAGE_KINDS)
            claims.append(Claim("substitution", sites, self.self_window, edits))
        if windows:
            span = Window(min(w.start for w in windows), max(w.stop for w in windows))
            claims.append(Claim("token map", self._sites_of_kinds(TEXT_KINDS), span, edits))
        return claims

    def _sites_of_kinds(self, kinds: Sequence[str]) -> Selector:
        chosen = matcher(self.sites)
        return lambda site: site.kind in kinds and chosen(site)

    def attach(self, target: Any) -> None:
        self._texts = PromptTexts(target, self.prompts)
        sites = select(sites_of(target), self.sites, who=self.name)
        self._image_sites = [site for site in sites if site.kind in IMAGE_KINDS]
        self._text_sites = [site for site in sites if site.kind in TEXT_KINDS]
        self._check_resolution()
        self._routing = TokenRouting(
            self._texts, self.modes, self.cross, self.gains, self.reweight_window, paper=self.paper
        )
        self._check_words(self._texts.read())

    def _check_resolution(self) -> None:
        known = [site.resolution for site in self._image_sites if site.resolution is not None]
        if self.self_resolution is not None and known and min(known) > self.self_resolution:
            given, shown = float(self.self_resolution), ", ".join(map(str, sorted(set(known))))
            raise InputError(
                f"{self.name}: self_resolution={given:g} leaves out every self-attention site; "
                f"their resolutions are {shown}"
            )

    def _check_words(self, texts: Sequence[PromptText]) -> None:
        """Raise WordError for a word that its prompts do not have."""
        edited = texts[1:]
        for word in self.cross.words:
            require_word(word, edited, f"{self.name}, cross_replace")
        for text, gains in zip(edited, self.gains, strict=True):
            for word in gains:
                among = edited if self.shared_gains else [text]
                require_word(word, among, f"{self.name}, reweight")
        for name, entries in (("blend", self.blend), ("subtract", self.subtract)):
            for text, words in zip(texts, entries, strict=True):
                for word in words:
                    require_word(word, [text], f"{self.name}, {name}")

    def begin(self, state: State) -> None:
        super().begin(state)
        self._check_words(self._texts.read(state.own_text))  # a run may cut more than the encoder
        finest = finest_within(self._image_sites, state.grid) if state.grid else None
        limit = self.self_resolution or finest
        self._layout_sites = {
            site.path
            for site in self._image_sites
            if limit is None or site.resolution is None or site.resolution <= limit
        }
        if self.local is not None:
            self.local.begin(self._text_sites, state)

    # -- in the run ----------------------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        if call.site.kind == "self":
            for row, source in self.edited(call) if self._takes_layout(call) else ():
                call.borrow(row, q=source, k=source)
        elif call.spans.text_keys is not None:
            start, stop = call.spans.text_keys
            # A joint site holds the self-attention of the image too.
            joint = call.site.kind == "joint" and self._takes_layout(call)
            for row, source in self.edited(call):
                routing = self._routing.at(row.prompt, call.clock, stop - start)
                call.route_by(row, source, routing, image_from_source=joint)
            if self.local is not None and call.rows.where(branch=COND):
                self.local.read(call, self._texts.read(stop - start))

    def _takes_layout(self, call: AttentionCall) -> bool:
        holds = holds_officially(self.self_window, call.clock, call.clock.steps)
        return holds and call.site.path in self._layout_sites

    def after(self, state: State) -> None:
        if self.local is not None:
            self.local.after(state)


def _resolution(value: float, name: str) -> Fraction:
    wanted = "the side of a grid over the side of the latent, such as 0.25 or 1"
    found = number(value, name, above=0, high=1, wanted=wanted)
    return Fraction(found).limit_denominator(64)
