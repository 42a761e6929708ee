"""ConsiStory: the same subject in a set of images, whose masks its words draw.

Tewel et al., "Training-Free Consistent Text-to-Image Generation", arXiv 2402.03286 (SIGGRAPH 2024).
With M_b the subject's place in image b (`SubjectMasks`), of which a random half is shown, image a
has in the decoder's self-attention

    out_a = Attn(q_a, [k_a; k_b[M_b] ...], [v_a; v_b[M_b] ...])
    q_a   = s q_plain + (1 - s) q                 in the first tenth of the steps (`QueryBlend`)
    out_a <- w out_b[nearest] + (1 - w) out_a     in a second run (`InjectedOutputs`)

q_plain are queries without sharing, which keep poses apart. What is nearest is told by features of
a first run (`matched`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from hookctl.address.clock import Window
from hookctl.address.rows import Row
from hookctl.address.sites import Grid, Selector, Site, matcher
from hookctl.arguments import checked, pair, refusal, share, whole, words_for_each
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.loop.branches import Branch
from hookctl.loop.state import State
from hookctl.recipes.common.features.correspondence import (
    InjectedOutputs,
    SeenFeatures,
    injection_sites,
    matches_of,
)  # fmt: skip
from hookctl.recipes.common.features.query_blend import QueryBlend
from hookctl.recipes.common.image_tokens import look_at
from hookctl.recipes.common.sites import TEXT_KINDS, image_sites
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from hookctl.recipes.common.subject_masks import SubjectMasks
from hookctl.run_state import RunState

INJECTED = Fraction(1, 2)  # resolution of the sites whose outputs are mixed
Words = str | Sequence[str] | None


class ConsiStory(SourceAndEdits):
    """Draw a set of prompts with the same subject.

        edit = ConsiStory(["a red star above a square", "a red star"], "star")
        images = edit.run(pipe, seed=0)     # two runs, the second with injection

    prompts: of the images, each of which starts from a noise of its own. subject: words that name
    it, for all prompts or in a list with one entry for each.
    anchors: how many of the images, from the first, are looked at by the others; None for all.
    dropped: share of a mask's cells left out in every step; seed: of these draws.
    queries: s at the first step of the window for queries and at its end; query_stop: where that
        is, 0 for none (which saves half of the rows).
    injected: share w of the first run's features in the second, 0 for one run without injection;
    inject_window: when, in fractions of the schedule.
    sites: self-attention that is shared. On a joint site it is the image's tokens.
    start, stop: fractions of the schedule; the first step has no masks yet.

    As an editor it does all but the injection, which needs `run`, and a UNet. (The official code,
    of SDXL alone, mixes outputs that it has mixed before; here they are the model's.)
    """

    least = 1
    one_noise = False
    _paths: RunState[frozenset[str]] = RunState()

    @checked(own=("prompts",))
    def __init__(
        self,
        prompts: Sequence[str],
        subject: Words | Sequence[Words],
        *,
        anchors: int | None = 2,
        dropped: float = 0.5,
        seed: int = 0,
        queries: tuple[float, float] = (0.9, 0.818),
        query_stop: float = 0.1,
        injected: float = 0.8,
        inject_window: tuple[float, float] = (0.1, 1 / 3),
        sites: Selector = "self up, self blocks, joint",
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        super().__init__(prompts)
        count = len(self.prompts)
        words = words_for_each(subject, "ConsiStory: subject", count)
        if not all(words):
            raise refusal("ConsiStory: subject", subject, "a word of every prompt")
        anchors = count if anchors is None else whole(anchors, "ConsiStory: anchors", 1)
        self.anchors = min(anchors, count)
        self.masks = SubjectMasks(words, share(dropped, "ConsiStory: dropped"), seed)
        weights = pair(queries, "ConsiStory: queries", share, "a pair such as (0.9, 0.818)")
        self.blend = QueryBlend(weights, Window.of((0.0, query_stop), "ConsiStory: query_stop"))
        self.injected = share(injected, "ConsiStory: injected")
        self.inject_window = Window.of(inject_window, "ConsiStory: inject_window")
        self.acts = Window.of((start, stop), "ConsiStory: start, stop")
        self.shared, self.sites = sites, self._acts_at

    @property
    def needs_words(self) -> bool:
        return True

    def _acts_at(self, site: Site) -> bool:
        return site.kind in TEXT_KINDS or matcher(self.shared)(site)

    def neutral(self) -> bool:
        return len(self.prompts) == 1 or self.acts.start >= self.acts.stop

    def claims(self) -> Sequence[Claim]:
        if self.neutral():
            return []
        blends = [Claim("substitution", self.shared, self.blend.window)]
        whole_image = Claim(WHOLE_IMAGE, window=self.acts, shared=True)
        return [*(blends if self.blend.window.stop else []), whole_image]

    def attach(self, target: Any) -> None:
        self._paths = frozenset(s.path for s in image_sites(self.name, target, self.shared))
        self.masks.attach(target, self.prompts)

    def begin(self, state: State) -> None:
        super().begin(state)
        self.masks.begin(self.name, state)

    def before(self, state: State) -> None:
        self.masks.step(state.clock.step)

    def branches(self, state: State) -> Mapping[str, Branch]:
        acts = self.acts.holds(state.clock) and not self.neutral()
        return self.blend.branches(state) if acts else {}

    def attention(self, call: AttentionCall) -> None:
        if self.neutral():
            return
        self.masks.read(call)
        if call.site.path in self._paths and self.acts.holds(call.clock):
            for row in [row for row in call.rows if not self.blend.is_plain(row)]:
                self.blend.blend(call, row)
                self._share(call, row)

    def _share(self, call: AttentionCall, row: Row) -> None:
        """Keys and values of the subject in the anchors, from the second step on."""
        grid, seen = call.require_grid(self.name), []
        for prompt in range(self.anchors) if call.clock.step else ():
            tokens = self.masks.shown((prompt, row.image), grid, call.clock.step)
            if prompt != row.prompt and tokens is not None and len(tokens):
                seen.append((call.rows.twin(row, prompt=prompt), tokens))
        look_at(call, row, seen)

    @checked()
    def run(
        self, pipe: Any, *editors: Editor, seed: int = 0, images: int = 1, **arguments: Any
    ) -> Any:
        """Draw the set, as `SourceAndEdits.run`: once without injection, else twice."""
        given = {"seed": seed, "images": images, **arguments}
        if not self.injected or self.neutral():
            return super().run(pipe, *editors, **given)
        sites, seen = injection_sites(self.name, pipe, INJECTED), SeenFeatures(INJECTED)
        super().run(pipe, *editors, seen, **given)
        self.masks.step()  # of all maps
        found = {one: self.masks.mask(one, Grid(*f.shape[-2:])) for one, f in seen.found.items()}
        masks = {one: mask for one, mask in found.items() if mask is not None}
        matches = matches_of(seen.found, masks, self.anchors)
        mix = InjectedOutputs(sites, matches, self.injected, self.inject_window)
        return super().run(pipe, *editors, mix, **given)
