"""NAG: a negative prompt inside the attention, for models that are drawn without guidance.

Chen et al., "Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models",
arXiv 2505.21179. Where the image attends to the text, with Z+ the output of the prompt and Z- that
of the negative one, both over all heads of a query:

    Z  = s Z+ - (s - 1) Z-                 away from the negative prompt (the paper's phi is s - 1)
    Z' = Z min(1, tau |Z+| / |Z|)          no longer than tau times the prompt's
    out = alpha Z' + (1 - alpha) Z+

These are two terms whose weights depend on both outputs: 1 - alpha + alpha c s for Z+ and
-alpha c (s - 1) for Z-, with c = min(1, tau |Z+| / |Z|). In a joint sequence the negative text runs
along beside the image, as it would in a run of its own, and takes the prompt's place; only the
image's queries are guided. What SDXL, SD3 and Flux read from a pooled text stays the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.rows import COND
from hookctl.address.sites import Selector
from hookctl.arguments import checked, is_text, number, one_of, refusal, share
from hookctl.attention.call import AttentionCall
from hookctl.attention.combination import OWN
from hookctl.editor import Editor
from hookctl.loop.prompts import EncodedTexts, check_texts
from hookctl.loop.run import check_batch
from hookctl.loop.state import State
from hookctl.recipes.common.sites import text_sites
from hookctl.run_state import RunState

NORMS = {"l1": 1, "l2": 2}


class NAG(Editor):
    """Normalized attention guidance, with or without the pipeline's own guidance.

    negative: what is not wanted: a text, embeddings [tokens, channels], or a list of them, one for
        each prompt of the run. It is NAG's own: a pipeline without guidance reads no negative one.
    scale: how far away from it, s; 1 for nothing, which costs nothing.
    tau: how much longer an output may get, from 1 on.
    alpha: share of the guided output, 0 for nothing.
    norm: of the outputs of a query, "l1" (the paper's) or "l2"; paper: as the published code,
        l2 in a joint sequence (its Flux) and l1 elsewhere.
    sites: attention to the text to act in; start, stop: fractions of the schedule.

    Costs a further attention to the text of the guided rows, and the negative text's own stream
    where text and image are one sequence; no further row but where the model numbers, pads and
    refines each row's text by itself (Z-Image). Rows of the pipeline's own negative prompt are left
    alone. Raises InputError for another number of negatives than of prompts.
    """

    _texts: RunState[EncodedTexts | None] = RunState(None)

    @checked(own=("negative",))
    def __init__(
        self,
        negative: str | Tensor | Sequence[str | Tensor],
        *,
        scale: float = 5.0,
        tau: float = 2.5,
        alpha: float = 0.25,
        norm: str = "l1",
        paper: bool = False,
        sites: Selector = "cross, joint",
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        shared = isinstance(negative, str | Tensor) or not isinstance(negative, Sequence)
        every: list[Any] = [negative] if shared else list(negative)
        shapes = {one.shape for one in every if isinstance(one, Tensor)}
        fit = all(one.dim() > 1 if isinstance(one, Tensor) else is_text(one) for one in every)
        if not every or not fit or len(shapes) > 1:
            wanted = "a text, or embeddings [tokens, channels], or one for each prompt, all alike"
            raise refusal("NAG: negative", negative, wanted)
        self.negatives, self.shared = every, shared
        self.scale = number(scale, "NAG: scale", low=1)
        self.tau = number(tau, "NAG: tau", low=1)
        self.alpha = share(alpha, "NAG: alpha")
        self.norm, self.paper = one_of(norm, "NAG: norm", tuple(NORMS)), paper
        self.sites, self.start, self.stop = sites, start, stop
        self._name = f"{self.name} {id(self):x}"  # of this editor's text: there may be several

    def neutral(self) -> bool:
        return self.scale == 1 or self.alpha == 0

    def attach(self, target: Any) -> None:
        check_texts(target, self.negatives, self.name)
        text_sites(self.name, target, self.sites)

    def begin(self, state: State) -> None:
        if not self.shared:
            check_batch(state, len(self.negatives), self.name)
        self._texts = None if self.neutral() else EncodedTexts(state, self.negatives)

    def _negative(self, prompt: int) -> str | Tensor:
        return self.negatives[0 if self.shared else prompt]

    def context(self, state: State) -> Mapping[str, Tensor] | None:
        texts = self._texts
        if texts is None or not state.rows.where(role=COND):
            return None
        if texts.of_one_length and not self.shared:
            rows = [texts.sequence(self._negative(row.prompt)) for row in state.rows]
            return {self._name: torch.stack(rows)}
        asked = dict.fromkeys(row.prompt for row in state.rows.where(role=COND))
        return {
            self._label(prompt): texts.sequence(self._negative(prompt))[None] for prompt in asked
        }

    def _label(self, prompt: int) -> str:
        """Of the text that a prompt's rows have in a call: one for all, where all have it or texts
        of one length, else each its own."""
        if self.shared or (self._texts is not None and self._texts.of_one_length):
            return self._name
        return f"{self._name} {prompt}"

    def attention(self, call: AttentionCall) -> None:
        if self._texts is None:
            return
        p = NORMS[self.norm]
        if self.paper:
            p = 2 if call.site.kind == "joint" else 1
        for row in call.rows.where(role=COND):
            shift = self._texts.shift(self._negative(row.prompt))
            shifts = None if shift is None else {"negative": shift}
            texts = {"negative": self._label(row.prompt)}
            call.outputs(row, texts, lambda z: self.weights(z, p), shifts=shifts)

    def weights(self, outputs: Mapping[str, Tensor], p: int) -> dict[str, Tensor]:
        """What each output counts at each query, [sub-batch, N].

        outputs: of the row's "own" text and of the "negative" one, [sub-batch, heads, N, channels];
        p: of the norm.
        """
        fine = torch.promote_types(outputs[OWN].dtype, torch.float32)
        own, negative = (outputs[name].to(fine) for name in (OWN, "negative"))
        away = self.scale * own - (self.scale - 1) * negative
        length, longest = (_norm(z, p) for z in (away, self.tau * own))
        cut = torch.where(length > longest, longest / length, torch.ones_like(length))
        of_own = 1 - self.alpha + self.alpha * cut * self.scale
        return {OWN: of_own, "negative": -self.alpha * cut * (self.scale - 1)}


def _norm(z: Tensor, p: int) -> Tensor:
    """Over the channels of all heads, [sub-batch, N]."""
    return z.transpose(1, 2).flatten(2).norm(p=p, dim=-1)
