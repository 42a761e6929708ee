"""The call of a pipeline, run step by step beside that of another one.

It runs in a thread of its own, which works only while the other waits for it: at the end of each
step it hands over what it predicted, and is given the latents of the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of
from hookctl.address.rows import COND
from hookctl.errors import InputError
from hookctl.hooks.patch import Patch
from hookctl.loop.energy import MapReader
from hookctl.loop.state import Predictions, State
from hookctl.session import control


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a pipeline predicted in a step, in its own parametrisation."""

    state: State
    latents: Tensor
    cond: Tensor
    guided: Tensor


class _Stop(BaseException):
    """The run is given up; no handler of ordinary errors may stop it."""


class CallBeside:
    """One call of a pipeline, in a thread that works only while another waits for it."""

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self._pipe, self._arguments, self.tap = pipe, arguments, _LastEditor(self)
        self.wanted: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.found: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        # What torch keeps for each thread.
        device = next(denoiser_of(pipe).parameters()).device
        self._autocast = torch.autocast(
            device.type,
            torch.get_autocast_dtype(device.type),
            torch.is_autocast_enabled(device.type),
        )
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.stream(torch.cuda.current_stream(device) if is_cuda else None)
        context = copy_context()
        self.thread = threading.Thread(
            target=context.run, args=(self._work,), name="layout model", daemon=True
        )
        self.thread.start()

    def _work(self) -> None:
        quiet = Patch(self._pipe, "_progress_bar_config", {"disable": True})
        try:
            with self._stream, self._autocast, control(self._pipe, self.tap, strict=False):
                self._pipe(**self._arguments)
        except _Stop:
            pass
        except BaseException as error:
            self.found.put(("error", error))
        else:
            self.found.put(("over", None))
        finally:
            quiet.remove()

    # -- for the one who waits -----------------------------------------------------------------

    def first(self) -> State:
        """The state of the first denoiser call, before it is made."""
        state: State = self._answer("ready")
        return state

    def predict(self, latents: Tensor) -> Predicted:
        """What the pipeline predicts for the latents of its next step."""
        self.wanted.put(("latents", latents))
        predicted: Predicted = self._answer("predicted")
        return predicted

    def do(self, job: Callable[[], Any]) -> Any:
        """What a function returns that is called inside the pipeline's step."""
        self.wanted.put(("job", job))
        return self._answer("done")

    def finish(self) -> None:
        self.wanted.put(("finish", None))
        self._answer("over")

    def stop(self) -> None:
        self.wanted.put(("stop", None))
        if self.thread is not threading.current_thread():
            self.thread.join(timeout=60)

    def _answer(self, expected: str) -> Any:
        try:
            kind, value = self.found.get()
        except BaseException:  # interrupted
            self.stop()
            raise
        if kind == "error":
            raise value
        if kind != expected:
            raise InputError(
                f"layout: {type(self._pipe).__name__} takes another number of steps than the "
                "controlled pipeline; give both one scheduler"
            )
        return value


class _LastEditor(MapReader):
    """The last editor of the pipeline: hands over its predictions, and puts latents in."""

    def __init__(self, run: CallBeside) -> None:
        self._run = run
        self._begun = False
        self._next: Tensor | None = None

    @property
    def _mine(self) -> bool:
        """Whether this is the run's own call, and not somebody else's of the same pipeline."""
        return threading.current_thread() is self._run.thread

    def before(self, state: State) -> None:
        if self._mine and not self._begun:
            self._begun = True
            self._run.found.put(("ready", state))
            x = self._wait()
            if x is not None and not torch.equal(x.to(state.latents), state.latents):
                state.latents = x.to(state.latents)

    def combine(self, predictions: Predictions) -> Tensor:
        if self._mine:
            state, guided = predictions.state, predictions.guided
            found = Predicted(state, state.latents, predictions[COND], guided)
            self._run.found.put(("predicted", found))
            self._next = self._wait()
        return predictions.guided

    def after(self, state: State) -> None:
        if self._mine and self._next is not None:
            state.latents = self._next.to(state.latents)

    def _wait(self) -> Tensor | None:
        """Do what is asked for until there are latents for the next step; None for the end."""
        while True:
            kind, value = self._run.wanted.get()
            if kind == "stop":
                raise _Stop
            if kind != "job":
                latents: Tensor | None = value
                return latents
            try:
                self._run.found.put(("done", value()))
            except Exception as error:
                self._run.found.put(("error", error))
