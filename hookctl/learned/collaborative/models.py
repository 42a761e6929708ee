"""The models of a collaboration, and how each is asked.

model=None                 the pipeline's own denoiser, as it predicts anyway
model=None, condition=c    the same one, asked once more under another condition
a denoiser                 of the same latents and times (`companions.denoiser`)
a pipeline                 of the same latents and schedule (`companions.pipeline`)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from hookctl.address.families import denoiser_of
from hookctl.address.rows import Rows
from hookctl.companions.denoiser import (
    CompanionDenoiser,
    condition_of,
    conditioned,
    guided_as_the_pipeline,
)
from hookctl.companions.pipeline import RESERVED, CompanionPipeline
from hookctl.errors import InputError
from hookctl.learned.collaborative.collaborator import Collaborator, module_of
from hookctl.learned.weights import Weights
from hookctl.loop.calls import predict
from hookctl.loop.state import Predictions, State, split_branches

EDITOR = "CollaborativeDiffusion"


class Model(Protocol):
    """A model of a collaboration, in a run.

    keeps_step: it must be asked in every step from the first; condition: of its own, or None.
    """

    keeps_step: bool
    condition: Tensor | None

    def attach(self, target: Any) -> None:
        """Check the pipeline that is controlled."""

    def begin(self, state: State) -> None:
        """A run starts, before its first denoiser call."""

    def condition_in(self, state: State) -> Tensor | None:
        """What it is told in the conditional rows of a call, [images, tokens, channels]."""

    def ask(self, state: State) -> dict[str, Tensor]:
        """Branch -> what it predicts for a call's rows, if `guided` is to be told of it."""

    def guided(self, predictions: Predictions, parts: dict[str, Tensor]) -> Tensor:
        """Its guided prediction of a step, [images, ...], from what `ask` returned in it."""

    def end(self, over: bool) -> None:
        """It is asked no more; over: the last step was made."""


class _OwnModel:
    """The pipeline's own denoiser; with a condition, asked once more."""

    keeps_step = False

    def __init__(self, given: Collaborator) -> None:
        self.given, self.condition = given, given.condition

    def attach(self, target: Any) -> None: ...

    def begin(self, state: State) -> None:
        _check_text(state, self.given)

    def condition_in(self, state: State) -> Tensor | None:
        return _own_condition(state, self.condition)

    def ask(self, state: State) -> dict[str, Tensor]:
        if self.condition is None:
            return {}
        own = Rows(state.rows[: state.own_rows])
        rows, text = conditioned(own, self.condition, self.given.negative)
        if not rows:
            return {}
        found = predict(state, rows, text=text).detach()
        return split_branches(_numbered(rows), found)

    def guided(self, predictions: Predictions, parts: dict[str, Tensor]) -> Tensor:
        if self.condition is None:
            return predictions.guided
        label = f"model {self.given.name!r}"
        return guided_as_the_pipeline(predictions, parts, editor=EDITOR, model=label)

    def end(self, over: bool) -> None: ...


class _OtherDenoiser(CompanionDenoiser):
    """Another denoiser, told the pipeline's text or a condition of its own."""

    keeps_step = False

    def __init__(self, given: Collaborator) -> None:
        super().__init__(
            module_of(given.model),
            label=f"model {given.name!r}",
            instead=", or model=None with a condition",
            condition=given.condition,
            negative=given.negative,
        )
        self.given = given

    def model(self, state: State) -> nn.Module:
        weights = self.given.model
        return weights.like(state.latents) if isinstance(weights, Weights) else self.denoiser

    def attach(self, target: Any) -> None:
        if not isinstance(self.given.model, Weights):  # those follow
            super().attach(target)

    def begin(self, state: State) -> None:
        super().begin(state)
        _check_text(state, self.given)

    def condition_in(self, state: State) -> Tensor | None:
        return _own_condition(state, self.condition)

    def ask(self, state: State) -> dict[str, Tensor]:
        return self.branches(state)

    def guided(self, predictions: Predictions, parts: dict[str, Tensor]) -> Tensor:
        return guided_as_the_pipeline(predictions, parts, editor=EDITOR, model=self.label)

    def end(self, over: bool) -> None: ...


class _OtherPipeline(CompanionPipeline):
    """A whole pipeline, through its own call, with its own guidance."""

    keeps_step = True
    condition: Tensor | None = None

    def __init__(self, given: Collaborator) -> None:
        super().__init__(
            given.model,
            given.arguments,
            label=f"model {given.name!r}",
            arguments_label=f"Collaborator {given.name!r}: arguments",
            reserved=tuple(name for name in RESERVED if name != "prompt"),
        )

    def condition_in(self, state: State) -> Tensor | None:
        return self.text()

    def ask(self, state: State) -> dict[str, Tensor]:
        self.step(state)
        return {}

    def guided(self, predictions: Predictions, parts: dict[str, Tensor]) -> Tensor:
        like, own = predictions.guided, predictions.own
        found = self.prediction(predictions.state).guided
        # What editors before this one have added to the guidance belongs to every model.
        return found if own is None or own is like else found + (like - own)

    def end(self, over: bool) -> None:
        if over:
            self.finish()
        else:
            self.close()


def model_of(given: Collaborator) -> Model:
    """The model of a collaborator; InputError for what is neither a denoiser nor a pipeline."""
    if given.model is None:
        return _OwnModel(given)
    if given.is_pipeline:
        return _OtherPipeline(given)
    try:
        denoiser_of(module_of(given.model))
    except InputError as error:
        raise InputError(
            f"Collaborator {given.name!r}: model is a {type(given.model).__name__}; give None for "
            "the pipeline's own denoiser, another denoiser, or a pipeline"
        ) from error
    return _OtherDenoiser(given)


def _own_condition(state: State, condition: Tensor | None) -> Tensor | None:
    """A condition for each image of a call, in place of the text of its conditional rows."""
    if condition is None:
        return condition_of(state)
    return condition.to(state.latents).expand(len(state.latents), -1, -1)


def _check_text(state: State, given: Collaborator) -> None:
    if given.condition is not None and state.text is None:
        raise InputError(
            f"Collaborator {given.name!r}: condition is given, but {type(state.denoiser).__name__} "
            "takes no text that it could stand for"
        )


def _numbered(rows: Rows) -> Rows:
    return Rows([replace(row, index=i) for i, row in enumerate(rows)])
