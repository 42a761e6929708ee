"""The end of a step: what the denoiser predicted, and the scheduler's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.address.families import handing
from hookctl.editor import overrides
from hookctl.errors import UnsupportedError
from hookctl.loop import around
from hookctl.loop.around import Attached
from hookctl.loop.driven import adjusted
from hookctl.loop.finite import PREDICTION, check_step
from hookctl.loop.outputs import stacked
from hookctl.loop.state import Handed, Predictions, State, split_branches

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

    def note(
        self, state: State, hooked: Any, output: Any, *, predictions: bool, awaited: bool = False
    ) -> None:
        """A call of this denoiser in this step is done; predictions: whether an editor combines
        those of the step, awaited: or works on its result, which needs the step of the pipeline's
        own scheduler."""
        if (
            (predictions or awaited)
            and self.state is not None
            and self.state.clock.step != state.clock.step
        ):
            raise UnsupportedError(
                f"{type(state.pipe).__name__} went on to step {state.clock.step} without a call of "
                "pipe.scheduler.step, such as by a copy of its scheduler, so what editors make of "
                "its predictions would be lost"
            )
        self.state, self.hooked = state, hooked
        if state.assigned is not None:
            self._latents = state.assigned
        found = stacked(output) if predictions else None
        if found is not None:
            self._branches |= split_branches(state.rows, found)

    def is_estimated(self, arguments: dict[str, Any]) -> bool:
        """Whether the scheduler's step is called for the estimate of a clean image alone, and will
        be called again."""
        declared = None if self.state is None else families.pipeline_of(self.state.pipe)
        wanted = None if declared is None else declared.estimate
        return wanted is not None and arguments.get(wanted) is None

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
            if latents.shape != arguments["sample"].shape:
                raise UnsupportedError(
                    f"state.latents {tuple(latents.shape)} were given to a step of "
                    f"{tuple(arguments['sample'].shape)}: {type(state.pipe).__name__} joins images "
                    "to its latents in a way unknown here, so they can't be changed before a "
                    "step; change them in `after`"
                )
            arguments["sample"] = _assigned(latents, arguments["sample"])
        own = arguments["model_output"]
        options = {name: value for name, value in arguments.items() if name not in _STEPPED}
        noisy = state.noisy = arguments["sample"][: len(state.images)]
        handed = _handing(state, arguments["sample"], own)
        trail = [("the latents before the step", arguments["sample"]), (PREDICTION, own)]
        for one in acting:
            if overrides(one.editor, "combine"):
                guided = arguments["model_output"]
                parts = {name: handed(part, noisy) for name, part in branches.items()}
                predictions = Predictions(guided, parts, state, own, options, handed)
                arguments["model_output"] = around.combine(one, predictions)
                trail.append((f"{one.editor.name}.combine", arguments["model_output"]))
        out = _adjusted(step(**arguments))
        trail.append(("the scheduler's step", _stepped(out)))
        after = [one for one in acting if overrides(one.editor, "after")]
        out = _edited(out, state, after, trail) if after else out
        if check:
            check_step(state, trail)
        return out


def _assigned(latents: Tensor, given: Tensor) -> Tensor:
    """Latents in the place of a step's own, in whose dtype they are: some pipelines step in float32
    what their model is shown in half precision, and what was not changed stays as fine."""
    if latents.dtype == given.dtype:
        return latents.to(given)
    shown = given.to(latents)
    return torch.where(latents == shown, given, latents.to(given))


def _handing(state: State, latents: Tensor, given: Tensor) -> Handed:
    """What the pipeline makes of a branch's prediction for a step that is given this."""
    declared = families.pipeline_of(state.pipe)
    own = None if declared is None else declared.handing

    def handed(prediction: Tensor, of: Tensor) -> Tensor:
        step = handing.Step(state.pipe, state.kwargs, state.sample, latents, given, of)
        return handing.own_part(prediction if own is None else own(prediction, step), step)

    return handed


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
