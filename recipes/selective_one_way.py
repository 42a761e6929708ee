"""Selective One-Way diffusion (SOW): cycles round an image, with the flow of attention steered.

Pei et al., "SOW: Selective One-Way Diffusion", arXiv 2411.19182. The cycles and writes are those of
Cyclic One-Way diffusion (`cyclic_one_way`), the modulation of self-attention is `one_way_flow`: the
image's region sees less of the rest, and the region that is to take after it sees more of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookctl.address.regions import RegionLike, region_of
from hookctl.arguments import checked
from hookctl.editor import Editor
from hookctl.recipes.cyclic_one_way import CyclicOneWay
from hookctl.recipes.one_way_flow import REST, OneWayFlow


class SelectiveOneWay(CyclicOneWay):
    """Draw a scene round an image, and let chosen parts of it take after the image.

        program = SelectiveOneWay(pipe, image, prompt, at=(128, 0), related=(0.2, 0.5, 0.8, 1.0))

    related: the part of the canvas that is to take after the image, by default the rest of it.
    spread: strength of the flow from the image to there; isolate: of that from anywhere to the
    image, below 0, both in units of attention scores (no numbers are public; these do what is meant
    in `demos/one_way.py`). anneal: let both fall to 0 over the schedule. Everything else is as for
    `CyclicOneWay`.
    """

    @checked()
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        related: RegionLike | None = None,
        spread: float = 2.0,
        isolate: float = -4.0,
        anneal: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(pipe, image, prompt, **options)
        regions: dict[str, RegionLike] = {"seed": self.pasted.box()}
        target = REST
        if related is not None:
            regions["related"], target = region_of(related, "related"), "related"
        others = [name for name in (*regions, REST) if name != "seed"]
        flows = [("seed", target, spread), *((name, "seed", isolate) for name in others)]
        self.flow = OneWayFlow(regions, flows, anneal=anneal)

    def run(self, *editors: Editor, output_type: str = "pil") -> Any:
        return super().run(self.flow, *editors, output_type=output_type)
