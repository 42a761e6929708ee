"""One owner per denoiser: of its hooks, and of the editors that are attached.

Contexts nest and end in any order; each adds its editors here and removes exactly those. When the
last one goes, everything is as it was found.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hookctl.address import families
from hookctl.address.sites import Site
from hookctl.editor import Editor, check_conflicts, overrides
from hookctl.errors import UnsupportedError
from hookctl.hooks.attention import SitePort
from hookctl.hooks.pipeline import DenoiserPort, PipelinePort, SchedulerPort, is_compiled
from hookctl.hooks.processors import Exchange
from hookctl.hooks.skips import ConcatPort, concats
from hookctl.loop.attached import Attached, Session, sites_for
from hookctl.loop.denoising import Denoising

_engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


class Engine:
    """Owner of a denoiser's hooks."""

    def __init__(self, denoiser: nn.Module, pipe: Any) -> None:
        self.denoiser, self.pipe = denoiser, pipe
        self.model = families.uncompiled(denoiser)
        self.modules = dict(
            (site.path, (site, module)) for site, module in families.describe_sites(denoiser)
        )
        self.attached: list[Attached] = []
        self._sessions: list[Session] = []
        self._ports: dict[str, SitePort] = {}
        self._concat_ports: list[ConcatPort] = []
        self._exchange = Exchange()
        self._denoising = Denoising(denoiser, pipe, self._ports, self._refresh)
        self._denoiser_port: DenoiserPort | None = None
        self._pipeline_port: PipelinePort | None = None
        self._scheduler_port: SchedulerPort | None = None

    @classmethod
    def of(cls, denoiser: nn.Module, pipe: Any) -> Engine:
        """The engine that owns the denoiser now, or a new one."""
        with _lock:
            key = families.uncompiled(denoiser)
            engine = _engines.get(key)
            if engine is None or not engine._sessions:
                engine = _engines[key] = cls(denoiser, pipe)
            if pipe is not None and engine.pipe is None:
                raise UnsupportedError(
                    "control(pipe) inside control(pipe.unet): wrap the pipeline in both contexts"
                )
            if pipe is not None and pipe is not engine.pipe:
                raise UnsupportedError(
                    f"the denoiser of this {type(pipe).__name__} is already under control through "
                    f"another pipeline ({type(engine.pipe).__name__}); end that context first"
                )
            return engine

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for site, _ in self.modules.values())

    # -- in and out ----------------------------------------------------------------------------

    def add(self, session: Session, editors: Sequence[Editor]) -> None:
        """Attach a session's editors; on any error nothing has changed."""
        with _lock:
            new = [
                Attached(editor, session, sites_for(editor, self.model, self.modules))
                for editor in editors
            ]
            check_conflicts([(a.editor, self.sites) for a in self.attached + new])
            first = not self._sessions
            self._sessions.append(session)
            self.attached += new
            try:
                if first:
                    self._exchange.remember(module for _, module in self.modules.values())
                    self._install()
                self._changed()
            except BaseException:
                self.remove(session)
                raise

    def remove(self, session: Session, *, failed: bool = False) -> None:
        """Detach a session's editors, and everything when none is left.

        failed: the session ends by an error.
        """
        with _lock:
            self._sessions = [s for s in self._sessions if s is not session]
            self.attached = [a for a in self.attached if a.session is not session]
            self._changed()
            if failed:
                self._exchange.tidy()
            if not self._sessions:
                self._uninstall()

    def _changed(self) -> None:
        self._denoising.changed(self._sessions, self.attached)
        self._sync_ports()

    def _install(self) -> None:
        denoising, run = self._denoising, self._denoising.run
        denoising.port = self._denoiser_port = DenoiserPort(
            self.denoiser, denoising.around_denoiser
        )
        if self.pipe is not None:
            self._pipeline_port = PipelinePort(self.pipe, run.restart, run.prepared, run.texts)
            self._hook_scheduler()

    def _hook_scheduler(self) -> None:
        scheduler = getattr(self.pipe, "scheduler", None)
        port = self._scheduler_port
        if port is not None and port.scheduler is scheduler:
            return
        if port is not None:
            port.remove()
        self._scheduler_port = (
            SchedulerPort(scheduler, self._denoising.around_step, self._denoising.run.scaled)
            if hasattr(scheduler, "step")
            else None
        )

    def _uninstall(self) -> None:
        for port in (self._denoiser_port, self._pipeline_port, self._scheduler_port):
            if port is not None:
                port.remove()
        self._denoiser_port = self._pipeline_port = self._scheduler_port = None
        self._denoising.port = None
        self._denoising.over()

    def _sync_ports(self) -> None:
        """Hook exactly the sites and concats that an editor wants."""
        wanted = set().union(*(a.sites for a in self.attached)) if self.attached else set()
        changed = wanted != set(self._ports)
        traced = False
        for path in set(self._ports) - wanted:
            self._exchange.restore(path)
            port = self._ports.pop(path)
            port.remove()
            traced |= port.traced
        for path in [site.path for site in self.sites if site.path in wanted]:
            if path not in self._ports:
                site, module = self.modules[path]
                own = families.text_call(module)
                self._ports[path] = SitePort(site, module, self._denoising, own_call=own)
                self._exchange.watch(path, self._ports[path])
        features = any(overrides(a.editor, "features") for a in self.attached)
        if features != bool(self._concat_ports):
            changed = True
            traced |= any(port.traced for port in self._concat_ports)
            for concat_port in self._concat_ports:
                concat_port.remove()
            found = concats(self.model) if features else ()
            self._concat_ports = [ConcatPort(c, self._denoising.edit_features) for c in found]
        now = families.denoiser_of(self.pipe) if self.pipe is not None else self.denoiser
        if traced or (changed and is_compiled(self._denoiser_port, self.denoiser, now)):
            # Code compiled before would never notice hooks that came or went.
            torch._dynamo.reset()

    def _refresh(self) -> None:
        """The pipeline's scheduler or processors may be others than before."""
        if self.pipe is not None:
            self._hook_scheduler()
        self._exchange.refresh()

    def silent_sites(self, session: Session) -> tuple[str, ...]:
        """Sites that an editor of the session was to be shown, but that never ran."""
        return self._denoising.silent_sites(session)
