"""Prompt-to-Prompt: edit a picture by editing its prompt.

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

from hookctl.address.clock import Window
from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.layout import LAYOUT_RESOLUTION, finest_within, within
from hookctl.address.rows import COND, Row
from hookctl.address.text import PromptText, TextLayout, align
from hookctl.attention.call import AttentionCall, Routing
from hookctl.attention.maps import MapStore
from hookctl.editor import Claim, Editor
from hookctl.errors import InputError
from hookctl.loop.state import State
from hookctl.recipes.local_blend import LocalBlend

MODES = ("auto", "replace", "refine")
Words = str | Sequence[str] | None
WindowLike = float | tuple[float, float]


class PromptToPrompt(Editor):
    """Edit pictures by word swap, refinement and re-weighting, with local blend.

    prompts: the source, then its edits; call the pipeline with `edit.prompts`.
    mode: "replace" (as many words, swapped), "refine" (words added or left out), "auto" (replace
        where the word counts agree), or one for each edit.
    cross_replace: until when the source's cross-attention is used: a fraction of the schedule, a
        pair, or {"default": ..., word of the edit: ...} for windows by word.
    self_replace: the same for self-attention, on grids up to `self_resolution` of the latent.
    reweight: {word of the edit: gain}, any sign; for several edits a list, None where there is
        none. It acts in the cross-attention window, as the official code does, or in
        `reweight_window`.
    blend: words whose places may change: one for all prompts, or one entry for each prompt (a
        word, several, or None). subtract: words whose places may not. blend_start: from which
        fraction on; blend_threshold: of the maps' maximum, for `blend` and for `subtract`.
    paper: align tokens exactly as the official code does, its misalignment of unequal token
        counts included.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        mode: str | Sequence[str] = "auto",
        cross_replace: WindowLike | Mapping[str, WindowLike] = 0.8,
        self_replace: WindowLike = 0.4,
        reweight: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        reweight_window: WindowLike | None = None,
        blend: Words | Sequence[Words] = None,
        subtract: Words | Sequence[Words] = None,
        blend_start: float = 0.2,
        blend_threshold: float | tuple[float, float] = 0.3,
        self_resolution: float = float(LAYOUT_RESOLUTION),
        paper: bool = False,
    ) -> None:
        if isinstance(prompts, str) or len(prompts) < 2:
            raise InputError(
                f"prompts={prompts!r}; give the source prompt and at least one edit, as a list"
            )
        self.prompts = [str(prompt) for prompt in prompts]
        edits = len(self.prompts) - 1
        self.modes = [mode] * edits if isinstance(mode, str) else list(mode)
        if len(self.modes) != edits or any(m not in MODES for m in self.modes):
            raise InputError(
                f"mode={mode!r}; give one of {', '.join(MODES)}, or one for each of {edits} edits"
            )
        self.cross = self._windows(cross_replace)
        self.self_window = Window.of(self_replace, "self_replace")
        self.reweight = self._per_edit(reweight, edits)
        self.reweight_window = (
            None if reweight_window is None else Window.of(reweight_window, "reweight_window")
        )
        self.blend = self._per_prompt(blend, "blend")
        self.subtract = self._per_prompt(subtract, "subtract")
        Window.of((0.0, blend_start), "blend_start")
        self.blend_start = float(blend_start)
        self.thresholds = _pair(blend_threshold, "blend_threshold")
        if not 0 < self_resolution <= 1:
            raise InputError(
                f"self_resolution={self_resolution!r}; give the side of a grid over the side of "
                "the latent, such as 0.25 or 1"
            )
        self.self_resolution = Fraction(self_resolution).limit_denominator(64)
        self.paper = paper
        self._local: LocalBlend | None = None

    # -- before anything runs ------------------------------------------------------------------

    @property
    def blends(self) -> bool:
        return any(self.blend)

    def claims(self) -> Sequence[Claim]:
        targets = tuple(range(1, len(self.prompts)))
        stop = max(window.stop for window in self.cross.values())
        found = []
        if self.self_window.stop > self.self_window.start:
            found.append(Claim("substitution", "self", self.self_window, targets))
        if stop > 0 or self.reweight_window is not None:
            found.append(Claim("token map", "cross, joint", Window(0.0, max(stop, 1e-9)), targets))
        return found

    def attach(self, target: Any) -> None:
        self._layout = TextLayout(target)
        self._sites = [
            site
            for site, _ in describe_sites(denoiser_of(target))
            if site.kind in ("cross", "joint")
        ]
        self._texts: dict[int | None, list[PromptText]] = {}
        self._aligned: dict[Any, tuple[Tensor, Tensor]] = {}
        self._routings: dict[Any, Routing] = {}
        texts = self._read(None)
        for edit in range(1, len(texts)):
            self._alignment(edit, texts)
            for word in (*self.cross, *self.reweight[edit - 1]):
                if word != "default" and (edit == 1 or word in self.reweight[edit - 1]):
                    self._anywhere(texts[1:] if word in self.cross else [texts[edit]], word)
        for text, words in zip(texts * 2, self.blend + self.subtract, strict=True):
            for word in words:
                text.find(word)

    def begin(self, state: State) -> None:
        if list(state.prompts) != self.prompts:
            raise InputError(
                f"{self.name} edits {self.prompts}, but the pipeline was called with "
                f"{list(state.prompts)}; call pipe(edit.prompts, ...)"
            )
        self._local = LocalBlend(self.thresholds) if self.blends else None
        self._maps: MapStore = state.maps
        self._blend_resolution = finest_within(self._sites, state.grid) if state.grid else None

    # -- attention -----------------------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        if call.site.kind == "self":
            self._self_attention(call)
        elif call.site.kind in ("cross", "joint"):
            self._cross_attention(call)
            self._read_maps(call)

    def _self_attention(self, call: AttentionCall) -> None:
        if not self.self_window.holds(call.clock) or call.grid is None:
            return
        if not within(call.grid, call.latent, self.self_resolution):
            return
        for row in _edits(call):
            source = call.rows.twin(row, prompt=0)
            call.borrow(row, q=source, k=source)

    def _cross_attention(self, call: AttentionCall) -> None:
        start, stop = call.spans.text_keys or (0, 0)
        # A joint site holds the self-attention of the image too.
        layout = call.site.kind == "joint" and self.self_window.holds(call.clock)
        for row in _edits(call):
            routing = self._routing(row.prompt, call, stop - start)
            source = call.rows.twin(row, prompt=0)
            call.route_by(row, source, routing, image_from_source=layout)

    def _routing(self, edit: int, call: AttentionCall, tokens: int) -> Routing:
        """The token map and gains of an edit at this turn."""
        key = (edit, tokens, call.clock.turn, call.clock.turns)
        if key not in self._routings:
            texts = self._read(tokens)
            token_map, aligned = self._alignment(edit, texts)
            alpha = self._alpha(texts[edit], call.clock.turn, call.clock.turns)
            gain = torch.ones_like(alpha)
            for word, value in self.reweight[edit - 1].items():
                gain[list(texts[edit].find(word))] = float(value)
            late = torch.ones_like(alpha)
            if self.reweight_window is not None:
                held = self.reweight_window.holds(call.clock)
                gain, late = (gain, gain) if held else (torch.ones_like(gain), late)
            own = (1 - aligned) * gain * alpha + (1 - alpha) * late
            moved = token_map * (aligned * gain * alpha)
            diagonal = moved.diagonal()
            if torch.equal(moved, torch.diag(diagonal)):
                moved = diagonal.clone()
            self._routings[key] = Routing(moved, own)
        return self._routings[key]

    def _alpha(self, text: PromptText, turn: int, turns: int) -> Tensor:
        """1 for the tokens whose window holds at this turn, [text]."""
        # The official table has one row more than there are steps.
        alpha = torch.zeros(text.tokens, dtype=torch.float64)
        for word, window in self.cross.items():
            on = int(window.start * (turns + 1)) <= turn < int(window.stop * (turns + 1))
            if word == "default":
                alpha[:] = float(on)
            elif _found(text, word):
                alpha[list(text.find(word))] = float(on)
        return alpha

    def _read_maps(self, call: AttentionCall) -> None:
        local, grid = self._local, call.grid
        if local is None or grid is None or call.site.resolution != self._blend_resolution:
            return
        start, stop = call.spans.text_keys or (0, 0)
        texts = self._read(stop - start)
        size, site, turn, maps = (grid.height, grid.width), call.site, call.clock.turn, self._maps
        for row in call.rows.where(branch=COND):
            for words, subtract in ((self.blend, False), (self.subtract, True)):
                for word in words[row.prompt]:

                    def keep(
                        row: Row, values: Tensor, word: str = word, subtract: bool = subtract
                    ) -> None:
                        local.add(row, values, size, subtract=subtract)
                        maps.note(word, site, turn, row, values, grid)

                    call.read(row, texts[row.prompt].find(word), keep)

    def after(self, state: State) -> None:
        if self._local is None or not state.grid:
            return
        if state.clock.turn + 1 > int(self.blend_start * state.clock.turns):
            state.latents = self._local.blend(state.latents, state.pictures, state.grid)

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
                words = [len(texts[i].text.split()) for i in (0, edit)]
                mode = "replace" if words[0] == words[1] else "refine"
            self._aligned[key] = align(texts[0], texts[edit], mode, paper=self.paper)
        return self._aligned[key]

    @staticmethod
    def _anywhere(texts: list[PromptText], word: str) -> None:
        """Raise the WordError of the first prompt unless one of the prompts has the word."""
        if not any(_found(text, word) for text in texts):
            texts[0].find(word)

    # -- arguments -----------------------------------------------------------------------------

    @staticmethod
    def _windows(value: WindowLike | Mapping[str, WindowLike]) -> dict[str, Window]:
        if not isinstance(value, Mapping):
            return {"default": Window.of(value, "cross_replace")}
        windows = {word: Window.of(w, f"cross_replace[{word!r}]") for word, w in value.items()}
        return {"default": windows.pop("default", Window()), **windows}

    @staticmethod
    def _per_edit(value: Any, edits: int) -> list[dict[str, float]]:
        given = [value] * edits if value is None or isinstance(value, Mapping) else list(value)
        if len(given) != edits:
            raise InputError(
                f"reweight has {len(given)} entries for {edits} edits; give one {{word: gain}} "
                "for each"
            )
        out = []
        for entry in given:
            gains = dict(entry or {})
            for word, gain in gains.items():
                if not isinstance(gain, int | float) or gain != gain:
                    raise InputError(f"reweight[{word!r}]={gain!r}; give a number")
            out.append(gains)
        return out

    def _per_prompt(self, value: Any, name: str) -> list[tuple[str, ...]]:
        if value is None or isinstance(value, str):
            return [() if value is None else (value,)] * len(self.prompts)
        if len(value) != len(self.prompts):
            raise InputError(
                f"{name}={value!r} has {len(value)} entries for {len(self.prompts)} prompts; give "
                "one word for all, or one entry for each prompt"
            )
        return [
            () if words is None else (words,) if isinstance(words, str) else tuple(words)
            for words in value
        ]

    # -- the whole job -------------------------------------------------------------------------

    def generators(self, seed: int = 0, images: int = 1, device: str = "cpu") -> list[Any]:
        """One generator for each picture: every prompt starts from the same noises.

        Picture j of each prompt is seeded with seed + j.
        """
        return [
            torch.Generator(device).manual_seed(seed + j)
            for _ in self.prompts
            for j in range(images)
        ]

    def run(
        self, pipe: Any, *editors: Editor, seed: int = 0, images: int = 1, **arguments: Any
    ) -> list[Any]:
        """Draw the source and its edits: prompt by prompt, `images` pictures of each.

        editors: further editors, after this one; arguments: of the pipeline's own call.
        """
        from hookctl.session import control

        with control(pipe, self, *editors):
            return list(
                pipe(
                    self.prompts,
                    generator=self.generators(seed, images),
                    num_images_per_prompt=images,
                    **arguments,
                ).images
            )


def _edits(call: AttentionCall) -> list[Row]:
    """The conditional rows of the edits."""
    return [row for row in call.rows.where(branch=COND) if row.prompt > 0]


def _found(text: PromptText, word: str) -> bool:
    try:
        return bool(text.find(word))
    except InputError:
        return False


def _pair(value: float | tuple[float, float], name: str) -> tuple[float, float]:
    one, two = value if isinstance(value, tuple | list) else (value, value)
    if not (0 <= one < 1 and 0 <= two < 1):
        raise InputError(f"{name}={value!r}; give a share of the maximum in 0..1, or two")
    return float(one), float(two)
