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
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.latent import finest_within
from hookctl.address.rows import COND
from hookctl.address.sites import Selector, matcher, select
from hookctl.address.text import PromptText, TextLayout, align
from hookctl.attention.call import AttentionCall, Routing
from hookctl.editor import WHOLE_IMAGE, Claim
from hookctl.errors import InputError, WordError
from hookctl.loop.state import State
from hookctl.recipes.common.local_blend import LocalBlend, Words, words_of
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from hookctl.recipes.common.word_windows import WindowLike, WordWindows, found

MODES = ("auto", "replace", "refine")
Gains = Mapping[str, float]


class PromptToPrompt(SourceAndEdits):
    """Edit images by word swap, refinement and re-weighting, with local blend.

        edit = PromptToPrompt(["a red cat", "a red dog"], blend=("cat", "dog"))
        source, edited = edit.run(pipe, seed=0)

    or, with a pipeline call of your own, `with hookctl.control(pipe, edit): pipe(edit.prompts,
    generator=edit.generators(seed=0))`.

    prompts: the source, then its edits. A word is looked up in the prompt by its letters, whatever
        number of tokens it has; every occurrence counts. Where a pipeline has several encoders,
        prompt_2= and prompt_3= of its call must be left out; on Flux, prompts are prompt_2.
    mode: "replace" (as many words, swapped), "refine" (words added or left out), "auto" (replace
        where the word counts agree), or a list with one for each edit.
    cross_replace: until when the source's cross-attention is used: a fraction of the schedule, a
        pair, or {"default": ..., word of the edit: ...} for windows by word.
    self_replace: the same for self-attention, in the sites that hold the layout (no finer than a
        quarter of the latent where there are such), or no finer than `self_resolution` of it.
    reweight: {word of the edit: gain}, any sign; for several edits a list, None where there is
        none. It acts in the cross-attention window, as the official code does, or in
        `reweight_window`.
    blend: words whose places may change: one for all prompts, or a list with one entry for each
        prompt (a word, several, or None). subtract: words whose places may not. blend_start: from
        which fraction on; blend_threshold: of the maps' maximum, for `blend` and for `subtract`.
    sites: where to act at all.
    paper: align tokens exactly as the official code does, its misalignment of unequal token
        counts included.

    After a run, `edit.local.mask(prompt, image)` is the last mask of the local blend.
    """

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
        edits = len(self.edits)
        self.modes = [mode] * edits if isinstance(mode, str) else list(mode)
        if len(self.modes) != edits or any(m not in MODES for m in self.modes):
            raise InputError(
                f"mode={mode!r}; give one of {', '.join(MODES)}, or one for each of {edits} edits"
            )
        self.cross = WordWindows.of(cross_replace, "cross_replace")
        self.self_window = Window.of(self_replace, "self_replace")
        self.self_resolution = _resolution(self_resolution)
        self.shared_gains = isinstance(reweight, Mapping)
        self.gains = _gains(reweight, edits)
        self.reweight_window = (
            None if reweight_window is None else Window.of(reweight_window, "reweight_window")
        )
        self.blend = words_of(blend, len(self.prompts), "blend")
        self.subtract = words_of(subtract, len(self.prompts), "subtract")
        if any(self.subtract) and not any(self.blend):
            raise InputError(f"subtract={subtract!r} takes places from blend=; give that too")
        start = Window.of((blend_start, 1.0), "blend_start").start
        thresholds = _pair(blend_threshold, "blend_threshold")
        blends = any(self.blend)
        self.local = LocalBlend(self.blend, self.subtract, start, thresholds) if blends else None
        self.sites, self.paper = sites, paper

    # -- before anything runs ------------------------------------------------------------------

    def claims(self) -> Sequence[Claim]:
        targets, mine = tuple(self.edits), matcher(self.sites)
        late = [self.reweight_window] if self.reweight_window and any(self.gains) else []
        windows = [w for w in (*self.cross.windows, *late) if w.start < w.stop]
        claims = []
        if self.local is not None:
            claims.append(Claim(WHOLE_IMAGE, window=Window(self.local.start, 1.0), shared=True))
        if self.self_window.start < self.self_window.stop:
            images = _both(mine, "self", "joint")
            claims.append(Claim("substitution", images, self.self_window, targets))
        if windows:
            span = Window(min(w.start for w in windows), max(w.stop for w in windows))
            claims.append(Claim("token map", _both(mine, "cross", "joint"), span, targets))
        return claims

    def attach(self, target: Any) -> None:
        self._layout = TextLayout(target)
        every = [site for site, _ in describe_sites(denoiser_of(target))]
        sites = select(every, self.sites, who=self.name)
        self._image_sites = [site for site in sites if site.kind in ("self", "joint")]
        self._text_sites = [site for site in sites if site.kind in ("cross", "joint")]
        self._check_resolution()
        self._texts: dict[int | None, list[PromptText]] = {}
        self._aligned: dict[Any, tuple[Tensor, Tensor]] = {}
        self._routings: dict[Any, Routing] = {}
        texts = self._read(None)
        for edit in self.edits:
            self._alignment(edit, texts)
        edited = texts[1:]
        for word in self.cross.words:
            _require(word, edited, "cross_replace")
        for text, gains in zip(edited, self.gains, strict=True):
            for word in gains:
                _require(word, edited if self.shared_gains else [text], "reweight")
        for name, entries in (("blend", self.blend), ("subtract", self.subtract)):
            for text, words in zip(texts, entries, strict=True):
                for word in words:
                    _require(word, [text], name)

    def begin(self, state: State) -> None:
        super().begin(state)
        self._read(state.own_text)
        finest = finest_within(self._image_sites, state.grid) if state.grid else None
        limit = self.self_resolution or finest
        self._layout_sites = {
            site.path
            for site in self._image_sites
            if limit is None or site.resolution is None or site.resolution <= limit
        }
        if self.local is not None:
            self.local.begin(self._text_sites, state)

    # -- attention -----------------------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        if call.site.kind == "self":
            for row, source in self.edited(call) if self._takes_layout(call) else ():
                call.borrow(row, q=source, k=source)
        elif call.spans.text_keys is not None:
            start, stop = call.spans.text_keys
            # A joint site holds the self-attention of the image too.
            joint = call.site.kind == "joint" and self._takes_layout(call)
            for row, source in self.edited(call):
                routing = self._routing(row.prompt, call.clock, stop - start)
                call.route_by(row, source, routing, image_from_source=joint)
            if self.local is not None and call.rows.where(branch=COND):
                self.local.read(call, self._read(stop - start))

    def after(self, state: State) -> None:
        if self.local is not None:
            self.local.after(state)

    def _takes_layout(self, call: AttentionCall) -> bool:
        return call.site.path in self._layout_sites and self.self_window.holds(call.clock)

    def _routing(self, edit: int, clock: Clock, tokens: int) -> Routing:
        """The token map and gains of an edit at this time; the same one until a window ends."""
        window, pattern = self.reweight_window, self.cross.pattern(clock)
        late = None if window is None else window.holds(clock)
        key = (edit, tokens, pattern, late)
        if key not in self._routings:
            texts = self._read(tokens)
            token_map, a = self._alignment(edit, texts)
            alpha = self.cross.alpha(texts[edit], pattern)
            gain = torch.ones_like(alpha)
            for word, value in self.gains[edit - 1].items():
                gain[list(found(texts[edit], word))] = float(value)
            none = torch.ones_like(gain)
            inside, outside = {None: (gain, none), True: (gain, gain), False: (none, none)}[late]
            moved = token_map * (a * alpha * inside)
            own = (1 - a) * alpha * inside + (1 - alpha) * outside
            diagonal = moved.diagonal()
            plain = torch.equal(moved, torch.diag(diagonal))
            self._routings[key] = Routing(diagonal.clone() if plain else moved, own)
        return self._routings[key]

    # -- words ---------------------------------------------------------------------------------

    def _read(self, tokens: int | None) -> list[PromptText]:
        if tokens not in self._texts:
            self._texts[tokens] = [self._layout.read(prompt, tokens) for prompt in self.prompts]
        return self._texts[tokens]

    def _alignment(self, edit: int, texts: list[PromptText]) -> tuple[Tensor, Tensor]:
        key = (edit, texts[0].tokens)
        if key not in self._aligned:
            mode = self.modes[edit - 1]
            if mode == "auto":
                same = texts[0].words == texts[edit].words
                mode = "replace" if same else "refine"
            self._aligned[key] = align(texts[0], texts[edit], mode, paper=self.paper)
        return self._aligned[key]

    def _check_resolution(self) -> None:
        known = [site.resolution for site in self._image_sites if site.resolution is not None]
        if self.self_resolution is not None and known and min(known) > self.self_resolution:
            raise InputError(
                f"self_resolution={float(self.self_resolution):g} leaves out every self-attention "
                f"site; their resolutions are {', '.join(map(str, sorted(set(known))))}"
            )


def _both(mine: Any, *kinds: str) -> Selector:
    return lambda site: site.kind in kinds and mine(site)


def _require(word: str, texts: Sequence[PromptText], name: str) -> None:
    """Raise WordError unless one of the prompts has the word."""
    if any(found(text, word) for text in texts):
        return
    try:
        texts[0].find(word)
    except WordError as error:
        raise WordError(f"PromptToPrompt, {name}: {error}") from None


def _resolution(value: float | None) -> Fraction | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(
            f"self_resolution={value!r}; give the side of a grid over the side of the latent, "
            "such as 0.25 or 1"
        )
    return Fraction(value).limit_denominator(64)


def _gains(value: Any, edits: int) -> list[dict[str, float]]:
    given = [value] * edits if value is None or isinstance(value, Mapping) else list(value)
    if len(given) != edits:
        raise InputError(
            f"reweight has {len(given)} entries for {edits} edits; give one {{word: gain}} for each"
        )
    for entry in given:
        if entry is not None and not isinstance(entry, Mapping):
            raise InputError(f"reweight={value!r}; give {{word: gain}}, or a list of them")
        for word, gain in (entry or {}).items():
            number = isinstance(gain, int | float) and not isinstance(gain, bool)
            if not number or abs(gain) == float("inf") or gain != gain:
                raise InputError(f"reweight[{word!r}]={gain!r}; give a finite number")
    return [dict(entry or {}) for entry in given]


def _pair(value: float | tuple[float, float], name: str) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or any(not isinstance(x, int | float) or not 0 <= x < 1 for x in pair):
        raise InputError(f"{name}={value!r}; give a share of the maximum in 0..1, or two")
    return float(pair[0]), float(pair[1])
