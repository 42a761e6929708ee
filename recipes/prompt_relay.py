"""Prompt Relay: what happens when in a video, by one text whose parts hold for some frames each.

Chen et al., "Prompt Relay", arXiv 2604.10030. The prompt is a scene followed by its parts. Where
the tokens of a video look at the text, a token of frame f pays for the words of part s

    C(f, s) = max(0, |f - m_s| - w_s)^2 / (2 sigma^2)

which is taken from the score: nothing between the ends of the part's own frames (m their middle, w
half of their span), ln(1 / epsilon) at `tail` frames beyond them. Words of the scene are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.rows import COND
from hookctl.address.sites import Selector
from hookctl.address.text import PromptText
from hookctl.arguments import checked, for_each, is_list, is_text, number, refusal, shown
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.state import State
from hookctl.recipes.common.frame_parts import faded, places_of, published, spans_of
from hookctl.recipes.common.prompt_texts import PromptTexts
from hookctl.recipes.common.sites import sites_of, text_sites
from hookctl.run_state import RunState
from hookctl.session import control


class PromptRelay(Editor):
    """Draw a video whose parts are said one after the other.

        relay = PromptRelay(["a cat sleeps", "the cat wakes up", "it runs away"], scene="a garden.")
        video = relay.run(pipe, num_frames=81)

    parts: texts in the order of their frames; scene: what holds throughout. Their tokens are those
    of the whole text, `relay.prompt`, with which the pipeline is to be called.
    lengths: how long each part is, relative to the others; None for equally long. They end at whole
    frames of the latent.
    tail: frames beyond its own in which a part fades out.
    sites: where the video attends to the text. start, stop: fractions of the schedule.
    paper: the published constants: a part is free two frames less far, and 23.9 one frame further.

    For video transformers; acts in rows that see the prompt. Raises UnsupportedError for other
    models, InputError for a part without frames, or outside of what the encoder reads.
    """

    _texts: RunState[PromptTexts] = RunState()
    _cost: RunState[Tensor] = RunState()  # [frames, parts]

    @checked(own=("parts",))
    def __init__(
        self,
        parts: Sequence[str],
        *,
        scene: str = "",
        lengths: Sequence[float] | None = None,
        tail: float = 2.0,
        sites: Selector = "cross, joint",
        start: float = 0.0,
        stop: float = 1.0,
        paper: bool = False,
    ) -> None:
        texts = list(parts) if is_list(parts) else []
        if not texts or not all(is_text(part) and part.strip() for part in texts):
            raise refusal("PromptRelay: parts", parts, "a text for each part, as a list")
        self.parts = [" ".join(part.split()) for part in texts]
        self.scene = " ".join(scene.split())
        given = [1.0] * len(texts) if lengths is None else list(lengths)
        for_each(given, "PromptRelay: lengths", len(texts), "parts", is_one=False)
        self.lengths = [number(one, "PromptRelay: lengths", above=0) for one in given]
        self.tail = number(tail, "PromptRelay: tail", above=0)
        self.sites, self.start, self.stop, self.paper = sites, start, stop, paper

    @property
    def prompt(self) -> str:
        """The text that the pipeline is to be given."""
        return " ".join([self.scene, *self.parts]).strip()

    def neutral(self) -> bool:
        return len(self.parts) == 1 and not self.paper

    def claims(self) -> Sequence[Claim]:
        return [] if self.neutral() else [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    @checked()
    def run(self, pipe: Any, *editors: Editor, seed: int = 0, **arguments: Any) -> Any:
        """Draw the video; editors: further ones; arguments: of the pipeline's own call."""
        with control(pipe, self, *editors):
            given = {**arguments, "return_dict": False}
            return pipe(prompt=self.prompt, generator=torch.Generator().manual_seed(seed), **given)[
                0
            ]

    def attach(self, target: Any) -> None:
        text_sites(self.name, target, self.sites)
        if any(site.kind == "temporal" for site in sites_of(target)):
            raise UnsupportedError(
                f"{self.name}: this model shows its text to one frame at a time; give it a video "
                "transformer, such as WanPipeline, LTXPipeline or HunyuanVideoPipeline"
            )
        self._texts = PromptTexts(target, [self.prompt])
        self._places(self._texts.read()[0])

    def begin(self, state: State) -> None:
        if len(state.grid) != 3 or state.latents.dim() == 4:
            raise UnsupportedError(f"{self.name}: this pipeline draws images, which have no frames")
        if any(prompt != self.prompt for prompt in state.prompts) or not state.prompts:
            raise InputError(
                f"{self.name}: the pipeline was called with {list(state.prompts)}; call "
                f"{state.call_with('relay.prompt')}, which is {self.prompt!r}"
            )
        self._cost = self.cost(state.grid[0])

    def cost(self, frames: int) -> Tensor:
        """C, [frames of the latent, parts]; InputError for a part without any frame."""
        spans = spans_of(self.lengths, frames)
        if any(start == stop for start, stop in spans):
            raise InputError(
                f"{self.name}: lengths={self.lengths} leave a part without any of {frames} frames "
                "of the latent; give fewer parts, or more frames"
            )
        return published(spans, frames) if self.paper else faded(spans, frames, self.tail)

    def attention(self, call: AttentionCall) -> None:
        if call.spans.text_keys is None or not self.active(call.clock):
            return
        grid = call.require_grid(self.name)
        start, stop = call.spans.text_keys
        places = self._places(self._texts.read(stop - start)[0])
        keys = torch.zeros(call.k.shape[-2], len(places), dtype=torch.float64)
        for part, positions in enumerate(places):
            keys[[start + p for p in positions], part] = 1
        queries = torch.zeros(call.q.shape[-2], len(places), dtype=torch.float64)
        # A token of several frames (CogVideoX 1.5) pays the mean of them.
        of_frames = F.adaptive_avg_pool1d(self._cost.mT, grid.frames).mT
        of_tokens = of_frames.repeat_interleave(grid.height * grid.width, 0)
        queries[slice(*call.spans.image_queries)] = -of_tokens
        call.bias(call.rows.where(role=COND), query_factors=queries, key_factors=keys)

    def _places(self, text: PromptText) -> list[list[int]]:
        """The token positions of each part."""
        found = places_of(self.parts, text, self.scene)
        if lost := [part for part, own in zip(self.parts, found, strict=True) if not own]:
            raise InputError(
                f"{self.name}: {shown(lost[0])} is not in the text that the encoder reads; shorten "
                "the parts or the scene, or write them as the pipeline does"
            )
        return found
