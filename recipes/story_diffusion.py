"""StoryDiffusion: one character in a set of images, which attend to samples of each other.

Zhou et al., "StoryDiffusion: Consistent Self-Attention for Long-Range Image and Video Generation",
arXiv 2405.01434 (NeurIPS 2024). In the decoder's self-attention, once the layout is there, image a
attends to its own tokens and to a random subset of those of every other, in each guidance branch:

    out_a = Attn(q_a, [k_a; k_b[S_b] for b != a], [v_a; v_b[S_b] ...])

S_b is the same for all queries and heads and drawn anew in each step; by chance a site is left
plain. Further images may look at those of the set without being looked at: in the official code
they are drawn afterwards from what it has stored, here in the same batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.address.sites import Selector
from hookctl.arguments import checked, refusal, share, whole
from hookctl.attention.call import AttentionCall
from hookctl.recipes.common.image_tokens import image_keys, look_at
from hookctl.recipes.common.sites import image_sites
from hookctl.recipes.common.source_and_edits import SourceAndEdits

LATE = 0.4  # of the schedule, from where sites are left plain less often
PUBLISHED = (5, 20)  # the same and the start in steps, as the official code counts them


class StoryDiffusion(SourceAndEdits):
    """Draw a set of prompts with the same character.

        edit = StoryDiffusion(["a striped red star", "a striped red star above a blue circle"])
        images = edit.run(pipe, seed=0)

    prompts: of the images, each of which starts from a noise of its own. references: how many of
    them, from the first, are looked at by the others; None for all.
    sampled: share of another image's tokens that is looked at. plain: how likely a site is left
    plain in a step, in the first 0.4 of the schedule and later. seed: of both draws, which are the
    same wherever and whenever a step is run.
    sites: self-attention to act in, by default a UNet's decoder and every block of a transformer.
    On a joint site the image's tokens are shared.
    start, stop: fractions of the schedule; start by default 0.1, with `paper` 0.
    paper: count steps as the official code does, whatever their number (nothing is shared before
        step 5, and sites are left plain less often from step 20 on), draw anew for each further
        image, and let it see all tokens of the references before step 5.

    Raises InputError for more references than prompts.
    """

    least = 1
    one_noise = False

    @checked(own=("prompts",))
    def __init__(
        self,
        prompts: Sequence[str],
        *,
        references: int | None = None,
        sampled: float = 0.5,
        plain: tuple[float, float] = (0.3, 0.1),
        seed: int = 0,
        sites: Selector = "self up, self blocks, joint",
        start: float | None = None,
        stop: float = 1.0,
        paper: bool = False,
    ) -> None:
        super().__init__(prompts)
        start = (0.0 if paper else 0.1) if start is None else start
        count = len(self.prompts)
        self.references = count
        if references is not None:
            self.references = whole(references, "StoryDiffusion: references", 1, count)
        self.sampled = share(sampled, "StoryDiffusion: sampled")
        if len(plain) != 2:
            raise refusal("StoryDiffusion: plain", plain, "two probabilities, such as (0.3, 0.1)")
        self.plain = tuple(share(p, "StoryDiffusion: plain") for p in plain)
        self.seed, self.sites, self.paper = seed, sites, paper
        self.start, self.stop = start, stop
        self.acts = Window.of((start, stop), "StoryDiffusion: start, stop")

    def neutral(self) -> bool:
        nobody = len(self.prompts) == 1 or self.plain == (1.0, 1.0)
        return nobody or self.sampled == 0 or self.acts.start >= self.acts.stop

    def attach(self, target: Any) -> None:
        image_sites(self.name, target, self.sites)

    def attention(self, call: AttentionCall) -> None:
        drawn: dict[int, list[Tensor]] = {}
        for row in call.rows if self.acts.holds(call.clock) else ():
            # 0 with the references; the official code draws each further image in a run of its own.
            run = max(0, row.prompt - self.references + 1) if self.paper else 0
            if run not in drawn:
                drawn[run] = self._seen(call, run)
            seen = [
                (call.rows.twin(row, prompt=prompt), tokens)
                for prompt, tokens in enumerate(drawn[run])
                if prompt != row.prompt
            ]
            look_at(call, row, seen)

    def _seen(self, call: AttentionCall, run: int) -> list[Tensor]:
        """Which image tokens of each reference are looked at, none of any where a site is plain."""
        tokens = image_keys(call.k, call).shape[-2]
        early, late = self._times(call.clock)
        if early:
            whole_image = torch.arange(tokens, device=call.k.device)
            return [whole_image] * self.references if run else []
        when = f"{self.seed} {call.clock.step} {run}"
        if random.Random(f"{when} {call.site.path}").random() <= self.plain[late]:
            return []
        generator = torch.Generator().manual_seed(random.Random(f"{when} {tokens}").getrandbits(62))
        drawn = torch.rand(self.references, tokens, generator=generator) < self.sampled
        return [chosen.nonzero()[:, 0].to(call.k.device) for chosen in drawn]

    def _times(self, clock: Clock) -> tuple[bool, bool]:
        """Whether a step is one of the official code's first, and whether it is a late one."""
        if self.paper:
            early, late = PUBLISHED
            return clock.step < early, clock.step >= late
        return False, not Window(0.0, LATE).holds(clock)
