"""The layout-to-image model of a mixture: what `RealCompo` asks of one, and two that there are.

SecondModel      another pipeline or denoiser of the same latent space, with whatever editors
                 it is under (`with hookctl.control(other, Grounding(...)):` round the run)
GuidedModel      the pipeline's own denoiser under layout guidance
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.address.rows import Row, Rows
from hookctl.errors import InputError
from hookctl.loop.calls import EVERYONE, predict
from hookctl.loop.driven import Driven, driving
from hookctl.loop.energy import Energies, MapReader
from hookctl.loop.state import State
from hookctl.recipes.common.energy_guidance import EnergyGuidance, WordEnergy
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
        latents that it is of, [images, ...]: those of the call, as they are or moved."""

    def measured(self, state: State, measure: Measure) -> Energies | None:
        """`measure` of this model's maps in a call; None if they are those of the pipeline's own
        model."""


class SecondModel:
    """Another pipeline, or a bare denoiser, that takes the same latents, times and text."""

    def __init__(self, target: Any) -> None:
        self.target, self.denoiser = target, denoiser_of(target)

    def attach(self, target: Any, reader: WordEnergy) -> None:
        own = denoiser_of(target)
        if uncompiled(self.denoiser) is uncompiled(own):
            raise InputError(
                "layout is the pipeline's own denoiser; give another one, or a LayoutGuidance"
            )
        theirs, ours = (next(one.parameters()).dtype for one in (self.denoiser, own))
        if theirs != ours:
            raise InputError(
                f"layout is a model in {theirs}, and the pipeline's is in {ours}; give both in one "
                f"dtype, as by .to({ours})"
            )
        self._reader = reader

    def begin(self, state: State) -> None:
        self._run = object()

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        rows = Rows(state.rows[: state.own_rows])
        there = replace(state, denoiser=self.denoiser)
        with driving(self._told(state, rows)):
            return predict(there, rows, reader=EVERYONE).detach(), state.latents

    def measured(self, state: State, measure: Measure) -> Energies:
        pipe = None if self.target is self.denoiser else self.target
        rows = Rows([_numbered(row, i) for i, row in enumerate(state.rows.where(branch="cond"))])
        there = replace(state, denoiser=self.denoiser, pipe=pipe)
        self._reader.reader = MapReader()  # the other model's calls are shown to its own editors
        try:
            with control(self.target, self._reader.reader), driving(self._told(state, rows)):
                return measure(there)
        finally:
            self._reader.reader = None

    def _told(self, state: State, rows: Rows) -> Driven:
        return Driven(
            self._run,
            uncompiled(self.denoiser),
            state.prompts,
            state.images_per_prompt,
            dict(state.encoding),
            rows,
            state.clock,
        )


class GuidedModel:
    """The pipeline's own denoiser, shown latents that an energy guidance has moved."""

    def __init__(self, guidance: EnergyGuidance) -> None:
        self.guidance = guidance

    def attach(self, target: Any, reader: WordEnergy) -> None:
        self.guidance.reader = reader
        self.guidance.attach(target)

    def begin(self, state: State) -> None:
        self.guidance.begin(state)

    def predict(self, state: State) -> tuple[Tensor, Tensor]:
        x = state.latents
        moved = self.guidance.moved(state) if self.guidance.active(state.clock) else None
        rows = state.rows[: state.own_rows]
        found = predict(state, rows, latents=moved).detach()
        return found, x if moved is None else moved

    def measured(self, state: State, measure: Measure) -> None:
        return None


def layout_model(given: Any) -> LayoutModel:
    """A layout model, from a guidance, a pipeline or a denoiser, or one as it is."""
    if isinstance(given, EnergyGuidance):
        return GuidedModel(given)
    if all(hasattr(given, name) for name in ("predict", "measured", "attach", "begin")):
        model: LayoutModel = given
        return model
    try:
        return SecondModel(given)
    except InputError as error:
        raise InputError(
            f"layout is a {type(given).__name__}; give a LayoutGuidance or BoxDiff, a pipeline, a "
            "denoiser, or an object as in hookctl.recipes.common.layout_models"
        ) from error


def _numbered(row: Row, index: int) -> Row:
    return replace(row, index=index)
