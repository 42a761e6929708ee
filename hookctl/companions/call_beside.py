"""The call of a pipeline, run step by step beside that of another one.

It runs in a thread of its own, which works only while the other waits for it: at the end of each
step it hands over what it predicted, and is given the latents of the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.address.rows import COND
from hookctl.errors import InputError
from hookctl.hooks.offloading import device_of
from hookctl.hooks.patch import Patch
from hookctl.loop.energy import MapReader
from hookctl.loop.state import Predictions, State
from hookctl.run_state import memory_here, remembering
from hookctl.session import control

PATIENCE = 60.0  # seconds that an ending call is waited for


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
    """One call of a pipeline, in a thread that works only while another waits for it.

    label: what errors call the pipeline's place, such as "layout".
    It ends with its last step (`finish`), by `stop`, or when nobody holds this object any more.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any], label: str = "layout") -> None:
        self._name, self._label = type(pipe).__name__, label
        self.tap = _LastEditor()
        # The thread must not hold this object, or nothing would end it.
        work = partial(
            copy_context().run, _call, pipe, dict(arguments), self.tap, _of_threads(pipe)
        )
        self._thread = threading.Thread(target=work, name=f"{label} model", daemon=True)
        self._thread.start()

    def first(self) -> State:
        """The state of the first denoiser call, before it is made."""
        state: State = self._answer("ready")
        return state

    def predict(self, latents: Tensor) -> Predicted:
        """What the pipeline predicts for the latents of its next step."""
        self.tap.wanted.put(("latents", latents))
        predicted: Predicted = self._answer("predicted")
        return predicted

    def do(self, job: Callable[[], Any]) -> Any:
        """What a function returns that is called inside the pipeline's step, with what the editors
        here know."""
        self.tap.wanted.put(("job", (job, memory_here())))
        return self._answer("done")

    def finish(self) -> None:
        """The last step is over: let the pipeline end."""
        self.tap.wanted.put(("finish", None))
        self._answer("over")
        self._thread.join(timeout=PATIENCE)

    def stop(self) -> None:
        """Give the call up."""
        self.tap.wanted.put(("stop", None))
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=PATIENCE)

    def __del__(self) -> None:
        if hasattr(self, "_thread") and self._thread.is_alive():
            self.tap.wanted.put(("stop", None))

    def _answer(self, expected: str) -> Any:
        try:
            kind, value = self.tap.found.get()
        except BaseException:  # interrupted
            self.stop()
            raise
        if kind == "error":
            raise value
        if kind != expected:
            raise InputError(
                f"{self._label}: {self._name} takes another number of steps than the controlled "
                "pipeline; give both one scheduler"
            )
        return value


def _of_threads(pipe: Any) -> list[AbstractContextManager[Any]]:
    """What torch keeps for each thread, as it is in this one."""
    device = device_of(uncompiled(denoiser_of(pipe)))
    kind = device.type
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    return [torch.cuda.stream(stream), autocast]


def _call(
    pipe: Any,
    arguments: dict[str, Any],
    tap: _LastEditor,
    contexts: list[AbstractContextManager[Any]],
) -> None:
    """Call the pipeline; of the thread."""
    tap.thread = threading.current_thread()
    quiet = Patch(pipe, "_progress_bar_config", {"disable": True})
    try:
        quiet.install()
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            stack.enter_context(control(pipe, tap, strict=False))
            pipe(**arguments)
    except _Stop:
        pass
    except BaseException as error:
        tap.found.put(("error", error))
    else:
        tap.found.put(("over", None))
    finally:
        quiet.remove()


class _LastEditor(MapReader):
    """The last editor of the pipeline: hands over its predictions, and puts latents in."""

    # Of this run alone: what is asked of it comes from the run of another pipeline.
    _collection: Any = None

    def __init__(self) -> None:
        self.wanted: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.found: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self._begun = False
        self._next: Tensor | None = None

    @property
    def _mine(self) -> bool:
        """Whether this is the run's own call, and not somebody else's of the same pipeline."""
        return threading.current_thread() is self.thread

    def before(self, state: State) -> None:
        if self._mine and not self._begun:
            self._begun = True
            self.found.put(("ready", state))
            x = self._wait()
            if x is not None and not torch.equal(x.to(state.latents), state.latents):
                state.latents = x.to(state.latents)

    def combine(self, predictions: Predictions) -> Tensor:
        if self._mine:
            state, guided = predictions.state, predictions.guided
            found = Predicted(state, state.latents, predictions[COND], guided)
            self.found.put(("predicted", found))
            self._next = self._wait()
        return predictions.guided

    def after(self, state: State) -> None:
        if self._mine and self._next is not None:
            state.latents = self._next.to(state.latents)

    def _wait(self) -> Tensor | None:
        """Do what is asked for until there are latents for the next step; None for the end."""
        while True:
            kind, value = self.wanted.get()
            if kind == "stop":
                raise _Stop
            if kind != "job":
                latents: Tensor | None = value
                return latents
            job, memory = value
            try:
                with nullcontext() if memory is None else remembering(memory):
                    self.found.put(("done", job()))
            except Exception as error:
                self.found.put(("error", error))
