"""The layout-to-image model of a mixture: what `RealCompo` asks of one, and two that there are.

SecondModel      another denoiser of the same latent space, with whatever editors it is under
                 (`with hookctl.control(other, Grounding(...)):` round the run)
GuidedModel      the pipeline's own denoiser under layout guidance
LayoutPipeline   another pipeline, through its own call (`layout_pipeline`)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from hookctl.address.rows import COND, Rows
from hookctl.companions.denoiser import CompanionDenoiser
from hookctl.errors import InputError
from hookctl.loop.calls import predict
from hookctl.loop.driven import driving
from hookctl.loop.energy import Energies, MapReader
from hookctl.loop.state import State
from hookctl.recipes.common.energy.energy_guidance import EnergyGuidance
from hookctl.recipes.common.energy.layout_pipeline import LayoutPipeline
from hookctl.recipes.common.energy.word_energy import WordEnergy
from hookctl.run_state import RunState
from hookctl.session import control

Measure = Callable[[State], Energies]


class LayoutModel(Protocol):
    """A model whose predictions keep a layout, for the rows of the pipeline's calls."""

    def attach(self, target: Any, reader: WordEnergy) -> None:
        """Check the pipeline; reader: the editor of the stack, which reads maps for the model."""

    def begin(self, state: State) -> None:
        """A run starts."""

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        """The prediction for every row of a call that is the pipeline's own, [rows, ...], and the
        latents that it is of, [images, ...]: those of the call, as they are or guided."""

    def energies(self, state: State, measure: Measure) -> Energies | None:
        """`measure` of this model's maps in a call; None if they are those of the pipeline's own
        model."""


class SecondModel(CompanionDenoiser):
    """A bare denoiser that takes the same latents, times and text, and means the same by its
    predictions."""

    _reader: RunState[WordEnergy] = RunState()

    def __init__(self, target: Any) -> None:
        super().__init__(target, label="RealCompo: layout", instead=", or a LayoutGuidance")

    def attach(self, target: Any, reader: WordEnergy | None = None) -> None:
        super().attach(target)
        assert reader is not None
        self._reader = reader

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        return self.predict_rows(state, Rows(state.rows[: state.own_rows])), state.latents

    def energies(self, state: State, measure: Measure) -> Energies:
        conditional = state.rows.where(branch=COND)
        rows = Rows([replace(row, index=i) for i, row in enumerate(conditional)])
        there = replace(state, denoiser=self.denoiser, pipe=None)
        self._reader.reader = _OtherReader()  # the other model's calls are its own editors'
        try:
            with control(self.target, self._reader.reader), driving(self.driven(state, rows)):
                return measure(there)
        finally:
            self._reader.reader = None


class _OtherReader(MapReader):
    """Reads in one model what is asked for in a run of another, whose state it is not kept by."""

    _collection: Any = None


class GuidedModel:
    """The pipeline's own denoiser, shown latents that an energy guidance has changed."""

    def __init__(self, guidance: EnergyGuidance) -> None:
        self.guidance = guidance

    def attach(self, target: Any, reader: WordEnergy) -> None:
        self.guidance.reader = reader
        self.guidance.attach(target)

    def begin(self, state: State) -> None:
        self.guidance.begin(state)

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        x, acts = state.latents, self.guidance.active(state.clock)
        guided = self.guidance.guided_latents(state) if acts else None
        rows = state.rows[: state.own_rows]
        prediction = predict(state, rows, latents=guided).detach()
        return prediction, x if guided is None else guided

    def energies(self, state: State, measure: Measure) -> None:
        return None


def layout_model(
    given: Any, arguments: Mapping[str, Any] | None, lasts_from: float | None
) -> LayoutModel | LayoutPipeline:
    """A layout model, from a guidance, a pipeline or a denoiser, or one as it is.

    arguments: of a pipeline's call; lasts_from: from which fraction of the schedule on the mixture
    needs a guidance to last, None for not at all. Raises InputError for a guidance that is over by
    then, and for arguments of what is no pipeline.
    """
    if isinstance(given, LayoutPipeline):
        return given
    is_pipeline = hasattr(given, "scheduler") and not isinstance(given, nn.Module)
    if is_pipeline:
        return LayoutPipeline(given, arguments)
    if arguments is not None:
        raise InputError(
            f"RealCompo: layout_arguments are of a pipeline's call, and layout is a "
            f"{type(given).__name__}; give them with a pipeline"
        )
    if isinstance(given, EnergyGuidance):
        return GuidedModel(_lasting(given, lasts_from))
    if all(hasattr(given, name) for name in ("predict", "energies", "attach", "begin")):
        model: LayoutModel = given
        return model
    try:
        return SecondModel(given)
    except InputError as error:
        raise InputError(
            f"layout is a {type(given).__name__}; give a LayoutGuidance or BoxDiff, a pipeline, a "
            "denoiser, or an object as in hookctl.recipes.common.energy.layout_models"
        ) from error


def _lasting(guidance: EnergyGuidance, start: float | None) -> EnergyGuidance:
    """A guidance that acts as long as the mixture needs it."""
    if start is None or not guidance.scale:
        return guidance
    if guidance.stops_by_default:
        # Its own end is that of a guidance alone; after it both models would be one.
        guidance = copy.copy(guidance)
        guidance.stop = 1.0
        return guidance
    if guidance.stop <= start < 1:
        raise InputError(
            f"RealCompo: the {guidance.name} stops at {guidance.stop:g}, before the mixture begins "
            f"at alone={start:g}, where both models would be the same; give it a later stop="
        )
    return guidance
