"""Another pipeline as the layout model of a mixture (`hookctl.companions.pipeline`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hookctl.address.outlines import Box
from hookctl.address.regions import Region
from hookctl.companions.pipeline import CompanionPipeline
from hookctl.errors import InputError
from hookctl.loop.energy import Energies
from hookctl.loop.state import State
from hookctl.recipes.common.energy.word_energy import WordEnergy
from hookctl.run_state import RunState


class LayoutPipeline(CompanionPipeline):
    """A pipeline of the same latent space and noise schedule as the one that is controlled.

    arguments: of its own call. For a GLIGEN pipeline without gligen_boxes the words and the
    regions' boxes are taken, in all steps.
    """

    _reader: RunState[WordEnergy] = RunState()

    def __init__(self, pipe: Any, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            pipe,
            arguments,
            label="layout",
            arguments_label="RealCompo: layout_arguments",
            instead=", or a LayoutGuidance",
        )

    def attach(self, target: Any, reader: WordEnergy | None = None) -> None:
        """Check the pipeline; reader: the editor of the stack, which reads maps for the model."""
        super().attach(target)
        assert reader is not None
        self._reader = reader

    def energies(self, state: State, measure: Callable[[State], Energies]) -> Energies:
        """`measure` of this model's maps in the step."""
        assert self._run is not None and self._now is not None  # since `step`
        run, there = self._run, self._now[1].state
        self._reader.reader = run.tap
        try:
            found: Energies = run.do(lambda: measure(there))
        finally:
            self._reader.reader = None
        return found

    def call(self, state: State) -> dict[str, Any]:
        return super().call(state) | self._boxes() | self.arguments

    def _boxes(self) -> dict[str, Any]:
        """For a GLIGEN pipeline: words and boxes of the mixture."""
        wants = "gligen_boxes" in self._known and "gligen_boxes" not in self.arguments
        words, regions = self._reader.words, self._reader.regions
        if not wants or regions is None:
            return {}
        if not (words.shared and regions.shared) and max(len(words), len(regions)) > 1:
            raise InputError(
                f"layout: {type(self.pipe).__name__} takes one list of boxes for all prompts; give "
                "words and regions for all prompts, or one prompt"
            )
        return {
            "gligen_phrases": list(words[0]),
            "gligen_boxes": [_box(region) for region in regions[0]],
            "gligen_scheduled_sampling_beta": 1.0,
        }


def _box(region: Region) -> list[float]:
    """The bounding box of a region, (x0, y0, x1, y1) as fractions of the canvas."""
    if isinstance(region.outline, Box):
        box = region.outline
        return [box.x0, box.y0, box.x1, box.y1]
    side = 64
    rows, columns = region.tokens(side, side).reshape(side, side).nonzero().unbind(1)
    ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return [float(end) / side for end in ends]
