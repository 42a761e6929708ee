"""MasaCtrl: another pose or place for the same thing, by attending to the source's appearance.

Cao et al., "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and
Editing", arXiv 2304.08465 (ICCV 2023). The source and its edits are drawn in one batch from one
noise. Once the layout is there (from step 4 of 50 on), in the decoder's fine self-attention, the
queries of an edit look into the keys and values of the source:

    mutual  Attn(q_e, k_s, v_s)                in the conditional and the unconditional rows
    union   Attn(q_e, [k_e; k_s], [v_e; v_s])
    masked  M_e Attn(q_e, k_s, v_s; M_s) + (1 - M_e) Attn(q_e, k_s, v_s; 1 - M_s)

M_s and M_e are where the thing is in the source and in the edit. Each query sees the keys of its
own side alone, so the masked form is one attention with a region for either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from hookctl.address.clock import Window
from hookctl.address.regions import RegionLike
from hookctl.address.rows import COND, UNCOND, Row
from hookctl.address.sites import Selector, Site, matcher
from hookctl.arguments import checked, number, one_of, words_for_each
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, WORDS, Claim
from hookctl.errors import InputError
from hookctl.loop.state import State
from hookctl.recipes.common.image_tokens import image_keys, with_image
from hookctl.recipes.common.map_masks import GivenMasks, WordMasks, foreground_regions
from hookctl.recipes.common.prompt_texts import PromptTexts
from hookctl.recipes.common.real_images.pinned import Path, Pinned
from hookctl.recipes.common.sites import TEXT_KINDS, image_sites, sites_of
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from hookctl.run_state import RunState

FINE = "self up @>=1/2, self blocks, joint"
INJECTIONS = ("source", "joint", "none")
Words = str | Sequence[str] | None


class MasaCtrl(SourceAndEdits):
    """Edit poses and places, keep the source's appearance.

        edit = MasaCtrl(["a striped red star", "a striped red star on a black background"])
        source, edited = edit.run(pipe, seed=0)

    prompts: the source, then its edits.
    start, stop: fractions of the schedule; the paper starts at 4 of 50 steps.
    sites: self-attention to act in, by default the fine half of a UNet's decoder. On a joint site
        the image's keys are taken from the source, the text's stay the row's own.
    union: attend to the source's keys beside the own ones, instead of in their place.
    inject_cond, inject_uncond: the same for the rows that see the prompt and those that do not:
        "source" (in their place), "joint" (beside them) or "none"; by default as `union` says
        (ProxEdit, arXiv 2306.05414, offers "joint" for the unconditional rows).
    source_mask, target_mask: where the thing is in the source and in the edits: regions, boxes or
        masks, target_mask one for all edits or a list. Foreground then looks into foreground only,
        and background into background.
    words: take both masks from the maps of words instead: one for all prompts, or a list with one
        entry for each prompt. threshold: of the maps, scaled to 0..1, above 0.
    path: latents of the source at every level, noisiest first: those of an inverted image
        (`loop.inversion`), which the source then is. The edits start from its noise too.
    paper: masks by a token's first pixel, of 0 and 1, and from the maps of the same step alone, as
        the official code has them; otherwise a token belongs where half of it is covered, and sites
        before the first map of a step use the last step's.

    A mask that would leave a query without keys (empty, or everything) is not used, and the site is
    edited as without one; in the official code, and with `paper`, that query attends to all keys
    evenly.

    Raises InputError for arguments that do not fit the prompts or each other; on entering
    `control`, WordError for words that their prompts do not have.
    """

    _edited_paths: RunState[set[str]] = RunState()
    _text_sites: RunState[list[Site]] = RunState()
    _texts: RunState[PromptTexts] = RunState()
    # Of which step, and by site and image the masks that were used there.
    _used: RunState[tuple[int, dict[Any, tuple[Tensor, Tensor] | None]]] = RunState((-1, {}))

    @checked(own=("prompts",))
    def __init__(
        self,
        prompts: Sequence[str],
        *,
        start: float = 0.08,
        stop: float = 1.0,
        sites: Selector = FINE,
        union: bool = False,
        inject_cond: str | None = None,
        inject_uncond: str | None = None,
        source_mask: RegionLike | None = None,
        target_mask: RegionLike | Sequence[RegionLike] | None = None,
        words: Words | Sequence[Words] = None,
        threshold: float = 0.1,
        path: Path | None = None,
        paper: bool = False,
    ) -> None:
        super().__init__(prompts)
        self.acts = Window.of((start, stop), "MasaCtrl: start, stop")
        self.edit_sites, self.paper = sites, paper
        named = {"inject_cond": inject_cond, "inject_uncond": inject_uncond}
        for name, value in named.items():
            if value is not None:
                one_of(value, f"MasaCtrl: {name}", INJECTIONS)
                if union:
                    raise InputError(f"MasaCtrl: give union=True or {name}={value!r}, not both")
        cond, uncond = (value or ("joint" if union else "source") for value in named.values())
        self.injected = {COND: cond, UNCOND: uncond}
        union = (cond, uncond) != ("source", "source")
        wanted = "a share of a map's range, above 0 and at most 1"
        number(threshold, "MasaCtrl: threshold", above=0, high=1, wanted=wanted)
        given = source_mask is not None or target_mask is not None
        chosen = words_for_each(words, "MasaCtrl: words", len(self.prompts))
        if given + any(chosen) + union > 1:
            raise InputError(
                "MasaCtrl: give one of source_mask with target_mask, words, or union=True (or "
                "another injection than 'source')"
            )
        self.given_masks = (
            GivenMasks(source_mask, target_mask, len(self.edits), nearest=paper) if given else None
        )
        self.word_masks = WordMasks(chosen, threshold, same_step=paper) if any(chosen) else None
        self.pin = None if path is None else Pinned(self.name, path, shared_start=True)
        self.sites = self._acts_at

    def _acts_at(self, site: Site) -> bool:
        """Whether a site is edited, or one whose maps the masks are made of."""
        maps = self.word_masks is not None and site.kind in TEXT_KINDS
        return maps or matcher(self.edit_sites)(site)

    @property
    def needs_words(self) -> bool:
        return self.word_masks is not None

    # -- before anything runs ------------------------------------------------------------------

    def claims(self) -> Sequence[Claim]:
        replaces = "source" in self.injected.values()
        if not replaces or self.acts.start >= self.acts.stop:
            return ()
        claims = [Claim("substitution", self.edit_sites, self.acts, tuple(self.edits))]
        if self.given_masks is not None or self.word_masks is not None:
            claims.append(Claim(WHOLE_IMAGE, window=self.acts, shared=True))
        if self.word_masks is not None:
            claims.append(Claim(WORDS, window=self.acts, shared=True))
        return claims

    def attach(self, target: Any) -> None:
        edited = image_sites(self.name, target, self.edit_sites)
        self._edited_paths = {site.path for site in edited}
        self._text_sites = [site for site in sites_of(target) if site.kind in TEXT_KINDS]
        if self.word_masks is not None:
            self._texts = PromptTexts(target, self.prompts)
            self._find_words(None)

    def begin(self, state: State) -> None:
        super().begin(state)
        self._used = (-1, {})
        if self.word_masks is not None:
            self._find_words(state.own_text)
            self.word_masks.begin(self._text_sites, state)
        if self.pin is not None:
            self.pin.begin(state)

    def _find_words(self, tokens: int | None) -> None:
        """Raise WordError for a word that its prompt does not have, in so many tokens."""
        assert self.word_masks is not None
        for text, words in zip(self._texts.read(tokens), self.word_masks.words, strict=True):
            for word in words:
                text.find(word)

    def before(self, state: State) -> None:
        if self.pin is not None:
            self.pin.before(state)

    # -- attention -----------------------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        if not self.acts.holds(call.clock):
            return
        if call.site.path in self._edited_paths:
            for row, source in self.paired(call.rows):
                self._look_into(call, row, source)
            self._restrict_to_masks(call)
        if self.word_masks is not None and call.spans.text_keys is not None:
            start, stop = call.spans.text_keys
            self.word_masks.read(call, self._texts.read(stop - start))

    def _look_into(self, call: AttentionCall, row: Row, source: Row) -> None:
        """The row's queries see the source's keys, alone or beside their own."""
        injected = self.injected[UNCOND if row.role == UNCOND else COND]
        if injected == "none":
            return
        joint = injected == "joint"
        if call.site.kind == "self":
            if joint:
                call.extend(row, source, source)
            else:
                call.borrow(row, k=source, v=source)
            return
        k, v = (image_keys(x[source.index], call) for x in (call.k, call.v))
        if joint:
            call.extend(row, k, v)
        else:
            span, own = call.spans.image_keys, (call.k[row.index], call.v[row.index])
            call.replace(row, k=with_image(own[0], k, span), v=with_image(own[1], v, span))

    def _restrict_to_masks(self, call: AttentionCall) -> None:
        """Foreground looks into foreground, background into background."""
        masks = self.given_masks or self.word_masks
        if masks is None:
            return
        grid, step = call.require_grid("MasaCtrl: masks"), call.clock.step
        if self._used[0] != step:
            self._used = step, {}
        used = self._used[1]  # what one call of a step took, the others take too
        for prompt, image in dict.fromkeys((r.prompt, r.image) for r in call.rows if r.prompt):
            key = call.site.path, call.index, prompt, image
            if key not in used:
                used[key] = masks.pair(prompt, image, grid, step)
            pair = used[key]
            if pair is None:
                continue
            rows, regions = (
                call.rows.where(prompt=prompt, image=image),
                foreground_regions(*pair, call),
            )
            if regions is not None:
                call.restrict(rows, *regions)
            elif self.paper and call.site.kind == "self":
                source, target = pair
                lost = ~target if source.all() else target
                call.map_queries(rows, partial(_evenly, lost.flatten().repeat(grid.frames)))


def _evenly(lost: Tensor, q: Tensor) -> Tensor:
    """Queries [..., tokens, channels] of which the lost ones attend to all keys alike."""
    return q.masked_fill(lost.to(q.device)[:, None], 0)
