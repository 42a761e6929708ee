"""The hooks on one pipeline, for all who control it: its own methods and its scheduler."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hookctl.address import families
from hookctl.hooks.patch import lock
from hookctl.hooks.pipeline import Inner, PipelinePort
from hookctl.hooks.scheduler import SchedulerPort
from hookctl.loop import here
from hookctl.loop.attached import Entry

_pipelines: weakref.WeakValueDictionary[int, PipelineHooks] = weakref.WeakValueDictionary()


class PipelineHooks:
    """Owner of the hooks on one pipeline and on the scheduler that it has."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._entries: dict[Entry, None] = {}
        self._port: PipelinePort | None = None
        self._scheduler_port: SchedulerPort | None = None

    @classmethod
    def of(cls, pipe: Any) -> PipelineHooks:
        """The owner of a pipeline's hooks."""
        with lock:
            hooks = _pipelines.get(id(pipe))
            if hooks is None:
                hooks = _pipelines[id(pipe)] = cls(pipe)
            return hooks

    def add(self, entry: Entry) -> None:
        with lock:
            self._entries[entry] = None
            self.sync()

    def remove(self, entry: Entry, *, failed: bool = False) -> None:
        with lock:
            self._entries.pop(entry, None)
            self.sync()

    def sync(self) -> None:
        """Hook the pipeline, and the scheduler that it has now, if a session is there."""
        with lock:
            wanted = bool(self._entries)
            if wanted and self._port is None:
                self._port = PipelinePort(
                    self.pipe, self._started, self._prepared, self._texts, self._ended
                )
                self._port.install()
            if not wanted and self._port is not None:
                self._port.remove()
                self._port = None
            scheduler = getattr(self.pipe, "scheduler", None) if wanted else None
            port = self._scheduler_port
            if port is not None and port.scheduler is not scheduler:
                port.remove()
                self._scheduler_port = port = None
            if port is None and hasattr(scheduler, "step"):
                self._scheduler_port = SchedulerPort(scheduler, self._around_step, self._scaled)
                self._scheduler_port.install()

    def _started(self, checked: dict[str, Any]) -> None:
        if mine := here.denoising_of_pipeline(self.pipe):
            mine.restarted(checked)
            self._follow()

    def _prepared(self) -> None:
        if mine := here.denoising_of_pipeline(self.pipe):
            mine.prepared()
            self._follow()

    def _follow(self) -> None:
        held = {families.uncompiled(one): one for _, one in families.denoisers_of(self.pipe)}
        for entry in list(self._entries):
            for hooks in entry.hooks:
                if hooks is not self:
                    hooks.follow(held)

    def _ended(self) -> None:
        mine = here.denoising_of_pipeline(self.pipe)
        if mine is not None and mine.run.fresh:
            for entry in mine.entries:
                entry.stepless = True

    def _texts(self, given: dict[str, Any]) -> None:
        if mine := here.denoising_of_pipeline(self.pipe):
            mine.run.texts(given)

    def _around_step(self, step: Inner, arguments: dict[str, Any]) -> Any:
        mine = here.denoising_of_step(self.pipe)
        return step(**arguments) if mine is None else mine.around_step(step, arguments)

    def _scaled(self, latents: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        if mine := here.denoising_of_step(self.pipe):
            mine.run.scaled(latents, again)
