"""The end of a step: what the denoiser predicted, and the scheduler's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.editor import overrides
from hookctl.loop import around
from hookctl.loop.around import Attached
from hookctl.loop.calls import prediction_of
from hookctl.loop.driven import adjusted
from hookctl.loop.finite import PREDICTION, check_step
from hookctl.loop.state import Predictions, State, split_branches

_STEPPED = ("model_output", "timestep", "sample")  # what a step is of; the rest are its options


class Step:
    """Collects the denoiser calls of one step until the scheduler steps."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.state: State | None = None
        self.hooked: Any = None
        self._branches: dict[str, Tensor] = {}
        self._latents: Tensor | None = None

    def note(self, state: State, hooked: Any, output: Any, *, predictions: bool) -> None:
        """A call of this denoiser in this step is done."""
        self.state, self.hooked = state, hooked
        if state.assigned is not None:
            self._latents = state.assigned
        found = prediction_of(output) if predictions else None
        if found is not None:
            self._branches |= split_branches(state.rows, found)

    def take(
        self,
        step: Callable[..., Any],
        arguments: dict[str, Any],
        acting: Sequence[Attached],
        *,
        check: bool,
    ) -> Any:
        """The scheduler's step between `combine` and `after` of the editors of this step.

        arguments: of the step, by name; check: that its result is finite.
        """
        state, latents, branches = self.state, self._latents, self._branches
        self.clear()
        if state is None:
            return step(**arguments)
        if latents is not None:
            arguments["sample"] = latents.to(arguments["sample"])
        own = arguments["model_output"]
        options = {name: value for name, value in arguments.items() if name not in _STEPPED}
        trail = [("the latents before the step", arguments["sample"]), (PREDICTION, own)]
        for one in acting:
            if overrides(one.editor, "combine"):
                guided = arguments["model_output"]
                parts = {
                    name: _like(part, guided, state, arguments["sample"])
                    for name, part in branches.items()
                }
                predictions = Predictions(guided, parts, state, own, options)
                arguments["model_output"] = around.combine(one, predictions)
                trail.append((f"{one.editor.name}.combine", arguments["model_output"]))
        out = _adjusted(step(**arguments))
        trail.append(("the scheduler's step", _stepped(out)))
        after = [one for one in acting if overrides(one.editor, "after")]
        out = _edited(out, state, after, trail) if after else out
        if check:
            check_step(state, trail)
        return out


def _like(prediction: Tensor, guided: Tensor, state: State, stepped: Tensor) -> Tensor:
    """A branch as its pipeline cuts it for the scheduler, where that is known.

    Some models predict a variance in further channels; edit models predict the tokens of their
    references too, behind those of the latents that are stepped, which begin the model input.
    """
    if prediction.shape[1:] == guided.shape[1:]:
        return prediction
    if prediction.dim() == 3 == guided.dim() and prediction.shape[2] == guided.shape[2]:
        own, given = guided.shape[1], state.kwargs[state.sample]
        if (
            own < prediction.shape[1] == given.shape[1]
            and stepped.shape[1:] == given[:, :own].shape[1:]
            and torch.equal(given[: len(stepped), :own].to(stepped), stepped)
        ):
            return prediction[:, :own]
        return prediction
    channels = guided.shape[1] if guided.dim() > 1 else 0
    return prediction[:, :channels] if prediction.shape[1] == 2 * channels else prediction


def _adjusted(out: Any) -> Any:
    """What the step returns, as a program wants it."""
    stepped = _stepped(out)
    return out if stepped is None else _with(out, stepped, adjusted(stepped))


def _stepped(out: Any) -> Any:
    """The latents in what a step returns."""
    return out[0] if isinstance(out, tuple) else getattr(out, "prev_sample", None)


def _edited(
    out: Any, state: State, acting: Sequence[Attached], trail: list[tuple[str, Any]]
) -> Any:
    """What the step returns, after the editors saw the new latents."""
    stepped = state.stepped = _stepped(out)
    for one in acting:
        around.after(one, state)
        trail.append((f"{one.editor.name}.after", state.stepped))
    return _with(out, stepped, state.stepped)


def _with(out: Any, before: Tensor, now: Tensor) -> Any:
    """What a step returns, with other latents."""
    if now is before:
        return out
    if isinstance(out, tuple):
        return (now, *out[1:])
    out.prev_sample = now
    return out
