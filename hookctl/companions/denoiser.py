"""Another denoiser beside the controlled one, asked in the same step for the same latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.address.rows import COND, UNCOND, Rows
from hookctl.errors import InputError
from hookctl.loop.calls import EVERYONE, predict
from hookctl.loop.driven import Driven, driving
from hookctl.loop.state import Predictions, State, split_branches
from hookctl.run_state import RunState


class CompanionDenoiser:
    """A bare denoiser that takes the same latents and times, and means the same by its predictions.

    label: what errors call it; instead: what else may be given, for an error. condition, negative:
    its own text embeddings, [1 | images, tokens, channels], for the conditional and for the
    unconditional rows, in place of the pipeline's; with a condition and no negative one it predicts
    the conditional rows alone.
    """

    _run: RunState[object] = RunState()

    def __init__(
        self,
        target: Any,
        *,
        label: str = "companion",
        instead: str = "",
        condition: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> None:
        self.target, self.denoiser = target, denoiser_of(target)
        self.label, self.instead = label, instead
        self.condition, self.negative = condition, negative

    def model(self, state: State) -> nn.Module:
        """The denoiser for a call."""
        return self.denoiser

    def attach(self, target: Any) -> None:
        """Check the pipeline that is controlled."""
        own = denoiser_of(target)
        if uncompiled(self.denoiser) is uncompiled(own):
            raise InputError(
                f"{self.label} is the pipeline's own denoiser; give another one{self.instead}"
            )
        kinds = [type(uncompiled(model)) for model in (self.denoiser, own)]
        if len({_latents_of(kind) for kind in kinds}) > 1:
            raise InputError(
                f"{self.label} is a {kinds[0].__name__}, which takes other arguments than the "
                f"pipeline's {kinds[1].__name__}; give one of the same kind{self.instead}"
            )
        theirs, ours = (next(model.parameters()).dtype for model in (self.denoiser, own))
        if theirs != ours:
            raise InputError(
                f"{self.label} is a model in {theirs}, and the pipeline's is in {ours}; give both "
                f"in one dtype, as by .to({ours})"
            )

    def begin(self, state: State) -> None:
        """A run starts."""
        self._run = object()

    def branches(self, state: State) -> dict[str, Tensor]:
        """Branch -> its predictions for the rows of a call that are the pipeline's own."""
        rows = Rows(state.rows[: state.own_rows])
        text = None
        if self.condition is not None:
            rows, text = conditioned(rows, self.condition, self.negative)
        if not rows:
            return {}
        found = self.predict_rows(state, rows, text)
        return split_branches(Rows([replace(row, index=i) for i, row in enumerate(rows)]), found)

    def predict_rows(self, state: State, rows: Rows, text: Tensor | None = None) -> Tensor:
        """Its predictions for rows of a call, [rows, ...]; text: in place of theirs."""
        there = replace(state, denoiser=self.model(state))
        told = Rows([replace(row, index=i) for i, row in enumerate(rows)])
        with driving(self.driven(state, told)):
            return predict(there, rows, text=text, reader=EVERYONE).detach()

    def driven(self, state: State, rows: Rows) -> Driven:
        """What the hooks of the other model are told of a call."""
        return Driven(
            self._run,
            uncompiled(self.model(state)),
            state.prompts,
            state.images_per_prompt,
            dict(state.encoding),
            rows,
            state.clock,
        )


def _latents_of(kind: type[nn.Module]) -> str:
    """What a denoiser's class calls its latents: "sample" of a UNet, "hidden_states" of others."""
    return list(signature(kind.forward).parameters)[1]


def conditioned(rows: Rows, condition: Tensor, negative: Tensor | None) -> tuple[Rows, Tensor]:
    """The rows that are to be predicted under conditions of their own, and those, one for each.

    Without a negative one these are the conditional rows.
    """
    if negative is None:
        rows = Rows(rows.where(branch=COND))
    texts = []
    for row in rows:
        text = condition if row.branch == COND or negative is None else negative
        place = [r.index for r in rows.where(branch=row.branch)].index(row.index)
        texts.append(text[place if len(text) > 1 else 0])
    return rows, torch.stack(texts) if texts else condition[:0]


def condition_of(state: State) -> Tensor | None:
    """The text that the conditional rows of a call see, [images, tokens, channels], without what
    editors added; None if the denoiser is given none."""
    if state.text is None:
        return None
    rows = [row.index for row in state.rows[: state.own_rows] if row.branch == COND]
    text: Tensor = state.kwargs[state.text][rows[0] : rows[-1] + 1]
    return text if state.own_text is None else text[:, : state.own_text]


def guided_as_the_pipeline(
    predictions: Predictions,
    own: Mapping[str, Tensor],
    *,
    editor: str,
    model: str,
) -> Tensor:
    """A model's predictions by branch, guided as the pipeline guides its own, with what editors
    before this one have added.

    editor, model: what errors call them. Raises InputError for a pipeline that guides otherwise
    than by u + scale (c - u).
    """
    like = predictions.guided
    pipeline = like if predictions.own is None else predictions.own
    if UNCOND not in own or UNCOND not in predictions.branches:
        return own[COND].to(like) + (like - pipeline)
    scale = float(getattr(predictions.state.pipe, "guidance_scale", 1.0))
    u, c = predictions[UNCOND], predictions[COND]
    told = torch.allclose(u + scale * (c - u), pipeline, rtol=1e-2, atol=1e-2)
    if not told:
        scale = guidance_scale_of(predictions) or 0.0  # of another name, or counted from 0
    if not told and not torch.allclose(u + scale * (c - u), pipeline, rtol=1e-2, atol=1e-3):
        raise InputError(
            f"{editor}: the pipeline guides otherwise than by u + scale (c - u), which {model} "
            "can't follow; leave guidance_rescale 0"
        )
    u, c = own[UNCOND].to(like), own[COND].to(like)
    return u + scale * (c - u) + (like - pipeline)


def guidance_scale_of(predictions: Predictions) -> float | None:
    """The scale of classifier-free guidance that a pipeline's own combination shows.

    guided = u + scale (c - u), solved for the scale; None where there is no u. Pipelines name and
    change their scale in many ways; this is what they did with it.
    """
    branches = predictions.branches
    if UNCOND not in branches or COND not in branches:
        return None
    u, c = branches[UNCOND].double(), branches[COND].double()
    own = predictions.guided if predictions.own is None else predictions.own
    difference = c - u
    size = float((difference * difference).sum())
    if not size:
        return 1.0
    return float(((own.double() - u) * difference).sum()) / size
