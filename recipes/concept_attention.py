"""ConceptAttention: where an image shows each of some words, by the outputs of its attention.

Helbling et al., "ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features",
arXiv 2502.04320 (ICML 2025). The concepts are a further text that runs along in the text's own
weights and sees itself and the image, while the image sees nothing of it. Of the attention's
outputs o, heads side by side, at each place of the image

    map_c = softmax over c of <o_c, o_image>

is averaged over sites and steps. It is sharper than the map of a word's attention, and no matrix is
formed. The published code has the first T5 token of each concept and modulates the stream with a
pooled text of zeros; here the pooled text is the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Selector
from hookctl.address.text import TextLayout
from hookctl.arguments import checked, refusal
from hookctl.attention.call import AttentionCall
from hookctl.editor import Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.calls import predict
from hookctl.loop.prompts import EncodedTexts, check_texts
from hookctl.loop.state import Proceed, State
from hookctl.maps import MapSums
from hookctl.recipes.common.sites import grid_of, image_sites, sites_of, two_stream_sites
from hookctl.run_state import RunState

CONCEPTS = "concepts"


class ConceptAttention(Editor):
    """Maps of words that need not be in the prompt; the image stays as it is, bit for bit.

    concepts: two or more words, of which each place of the image is shared out among; without one
        for the rest, such as "background", everything belongs to an object.
    paper: the first token of each concept alone, as published, and not all of them.
    sites: joint attention that is read; None: as published, on FLUX the last fifth of the blocks in
        which the text has weights of its own, on SD3 all of these. start, stop: fractions of the
        schedule.

    After a run, `maps` has the map of each concept, [images, height, width], whose sum at a place
    is 1 (of a run in progress: so far). Costs a further call of the denoiser in a step, for the
    rows of the prompt: the image's own is not touched. SD3 and FLUX.1 alone.
    """

    sites: RunState[Selector] = RunState(None)
    _encoded: RunState[Tensor] = RunState()  # [1, tokens, channels]
    _counts: RunState[list[int]] = RunState(factory=list)  # tokens of each concept
    _sums: RunState[MapSums[tuple[int, int, Grid]]] = RunState(factory=MapSums, kept=True)
    _outputs: RunState[dict[int, Tensor]] = RunState(factory=dict)
    _looking: RunState[bool] = RunState(False)

    @checked()
    def __init__(
        self,
        concepts: Sequence[str],
        *,
        paper: bool = False,
        sites: Selector = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.concepts = tuple(dict.fromkeys(concepts))
        if len(self.concepts) < 2 or not all(c.strip() for c in self.concepts):
            raise refusal(
                "ConceptAttention: concepts", concepts, 'two or more, such as ["cat", "background"]'
            )
        self.paper, self.given_sites = paper, sites
        self.sites, self.start, self.stop = sites, start, stop

    @property
    def maps(self) -> dict[str, Tensor]:
        """The map of each concept, [images, height, width], on the CPU."""
        means = {key: mean for key, (mean, _) in self._sums.means().items()}
        if not means:
            raise InputError("ConceptAttention: nothing was drawn yet; read its maps after a run")
        finest = max((grid for *_, grid in means), key=lambda grid: grid.tokens)
        images = torch.stack([means[k] for k in sorted(means) if k[2] == finest]).cpu()
        return dict(zip(self.concepts, images.unbind(1), strict=True))

    def attach(self, target: Any) -> None:
        check_texts(target, self.concepts, self.name)
        joint = [site for site in sites_of(target) if site.kind == "joint"]
        if not joint:
            raise UnsupportedError(
                f"ConceptAttention: the text of {type(target).__name__} asks nothing of the image; "
                "it needs a model that has both in one sequence (SD3, FLUX.1)"
            )
        model = families.uncompiled(families.denoiser_of(target))
        record = families.model_of(model)
        if record is None or not record.loose_text:
            raise UnsupportedError(
                f"ConceptAttention widens the text by single tokens, and those of "
                f"{type(model).__name__} have positions in the prompt's template; of such models "
                "it reads those of SD3 and Flux"
            )
        if (given := self.given_sites) is None:
            own = two_stream_sites(target)
            given = own if len(own) == len(joint) else own[-max(1, round(len(own) / 5)) :]
        self.sites = given
        image_sites(self.name, target, self.sites, ("joint",))

    def begin(self, state: State) -> None:
        self._sums, self._outputs, self._looking = MapSums(), {}, False
        texts, layout = EncodedTexts(state, self.concepts), TextLayout(state.pipe)
        parts: list[Tensor] = []
        for concept in self.concepts:
            sequence = texts.sequence(concept)
            read = layout.read(concept, sequence.shape[0])
            tokens, (start, last) = read.find(concept), read.streams[-1]
            if self.paper:
                tokens = (start + last.words[0].tokens[0],)
            parts.append(sequence[list(tokens)])
        self._encoded, self._counts = torch.cat(parts)[None], [*map(len, parts)]

    def denoise(self, state: State, proceed: Proceed) -> Any:
        out, rows = proceed(), state.rows.where(branch=COND)
        self._looking = bool(rows)
        try:
            if rows:
                predict(state, rows, reader=self)
        finally:
            self._looking = False
        return out

    def context(self, state: State) -> Mapping[str, Tensor] | None:
        return {CONCEPTS: self._encoded} if self._looking else None

    def attention(self, call: AttentionCall) -> None:
        if self._looking:
            rows = call.rows.where(branch=COND)
            call.read_outputs(rows, self._keep, text=CONCEPTS)
            call.read_outputs(rows, partial(self._compare, grid_of(call, self.name)))

    def _keep(self, row: Row, outputs: Tensor) -> None:
        self._outputs[row.index] = _fine(outputs[0])

    def _compare(self, grid: Grid, row: Row, image: Tensor) -> None:
        """image: the outputs of the image's queries, [1, N, channels]."""
        tokens = _fine(image[0]) @ self._outputs.pop(row.index).mT
        scores = [part.mean(1) for part in tokens.split(self._counts, 1)]
        shares = torch.stack(scores).softmax(0).unflatten(1, (grid.height, grid.width))
        self._sums.add((row.prompt, row.image, grid), shares.detach())


def _fine(outputs: Tensor) -> Tensor:
    """In which thousands of products are summed."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
