"""The models of a collaboration: what is given of each, and how it is asked.

model=None                 the pipeline's own denoiser, as it predicts anyway
model=None, condition=c    the same one, asked once more under another condition
a denoiser                 of the same latents and times (`companion_denoiser`)
a pipeline                 of the same latents and schedule (`companion_pipeline`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.address.rows import Rows
from hookctl.errors import InputError
from hookctl.loop.calls import predict
from hookctl.loop.state import Predictions, State, split_branches
from hookctl.recipes.common.companion_denoiser import (
    CompanionDenoiser,
    condition_of,
    conditioned,
    guided_as_the_pipeline,
)
from hookctl.recipes.common.companion_pipeline import RESERVED, CompanionPipeline

EDITOR = "CollaborativeDiffusion"
# (latents [images, channels, h, w], timestep, condition [images, tokens, channels] or None) ->
# logits [images, 1, h, w]
Influence = Callable[[Tensor, float, Tensor | None], Any]


@dataclass(frozen=True, eq=False)
class Collaborator:
    """One modality: a model, what it is told, and the network that says how far to trust it where.

    influence: the dynamic diffuser, a UNet2DConditionModel with one output channel or a function
    (latents, timestep, condition) -> logits [images, 1, h, w]; None for 0 everywhere. It sees the
    latents as the denoiser does, without channels that the pipeline appends.
    model: None for the pipeline's own denoiser; another one, or a whole pipeline.
    condition: text embeddings, [1 | images, tokens, channels], for the model and for its influence
    in place of the pipeline's; negative: for the unconditional rows. Without a negative one the
    model is not guided. Not for pipelines, which are conditioned through their call.
    arguments: of a pipeline's call; what is not given is that of the controlled one.
    """

    name: str
    influence: nn.Module | Influence | None = None
    model: Any = None
    condition: Tensor | None = None
    negative: Tensor | None = None
    arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        label = f"Collaborator {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"Collaborator: name={self.name!r}; give a word, such as 'mask'")
        if self.influence is not None and not callable(self.influence):
            raise InputError(
                f"{label}: influence is a {type(self.influence).__name__}; give a UNet with one "
                "output channel, or a function (latents, timestep, condition) -> logits"
            )
        channels = getattr(getattr(self.influence, "config", None), "out_channels", 1)
        if channels != 1:
            raise InputError(
                f"{label}: influence has {channels} output channels; give a network with one"
            )
        for name in ("condition", "negative"):
            given = getattr(self, name)
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.dim() != 3 or not given.is_floating_point():
                kind = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise InputError(
                    f"{label}: {name} is {kind}; give embeddings [1 | images, tokens, channels]"
                )
            if self.is_pipeline:
                raise InputError(
                    f"{label}: {name} is given with a pipeline, which is conditioned through its "
                    "call; give arguments=, such as {'prompt_embeds': ...}"
                )
        if self.negative is not None and self.condition is None:
            raise InputError(f"{label}: negative is given without condition; give both")
        if self.arguments is not None and not self.is_pipeline:
            raise InputError(f"{label}: arguments are of a pipeline's call; give model=a pipeline")

    @property
    def is_pipeline(self) -> bool:
        return hasattr(self.model, "scheduler") and not isinstance(self.model, nn.Module)

    def ask_influence(self, x: Tensor, timestep: float, condition: Tensor | None) -> Any:
        """What the influence network returns for the latents of the conditional rows."""
        network = self.influence
        if not isinstance(network, nn.Module):
            assert network is not None
            return network(x, timestep, condition)
        like = next(network.parameters(), x)  # a network of the user's may stand elsewhere
        t = torch.tensor(timestep, device=like.device)
        return network(x.to(like), t, None if condition is None else condition.to(like))

    def check(self, state: State, condition: Tensor | None) -> None:
        """InputError for networks and conditions that do not fit the run."""
        label, channels = f"Collaborator {self.name!r}", state.latents.shape[1]
        model = denoiser_of(self.model) if self.is_pipeline else self.model
        for what, network in (("model", model), ("influence", self.influence)):
            module = uncompiled(network) if isinstance(network, nn.Module) else None
            config = getattr(module, "config", None)
            inputs = getattr(config, "in_channels", channels)
            if self.is_pipeline and what == "model":
                inputs = min(inputs, channels)  # it may append images and masks to its latents
            if inputs != channels:
                raise InputError(
                    f"{label}: {what} takes latents of {inputs} channels and the pipeline draws "
                    f"{tuple(state.latents.shape)}; give networks of one latent space"
                )
            width = getattr(config, "cross_attention_dim", None)
            if condition is not None and isinstance(width, int) and width != condition.shape[-1]:
                raise InputError(
                    f"{label}: {what} takes a condition of {width} channels, and condition is "
                    f"{tuple(condition.shape)}"
                )
        images = len(state.latents)
        for name in ("condition", "negative"):
            given = getattr(self, name)
            if given is not None and len(given) not in (1, images):
                raise InputError(
                    f"{label}: {name} is for {len(given)} images and the run draws {images}; give "
                    f"one for all, or {images}"
                )


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
            given.model,
            label=f"model {given.name!r}",
            instead=", or model=None with a condition",
            condition=given.condition,
            negative=given.negative,
        )
        self.given = given

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
        denoiser_of(given.model)
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
