"""What is installed: the hooks on one denoiser, and on one pipeline, for all who control it.

Hooks are shared by every session, thread and task, and hold nothing of any: each asks `loop.here`
whose call it caught. They come with the first session that wants them and go with the last, and
`sync` puts in or takes out whatever is missing or left, also what an interrupt left half done.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hookctl.address import families
from hookctl.editor import overrides
from hookctl.errors import InputError, UnsupportedError, naming
from hookctl.hooks.attention import SitePort
from hookctl.hooks.patch import lock
from hookctl.hooks.pipeline import DenoiserPort, Inner, forget_compiled, is_compiled
from hookctl.hooks.processors import Exchange
from hookctl.hooks.skips import concats
from hookctl.loop import here
from hookctl.loop.attached import Attached, Entry, Modules, attach
from hookctl.loop.attending import Attending, InsidePort, ports_inside
from hookctl.loop.calls import calls
from hookctl.loop.conflicts import check_conflicts
from hookctl.loop.denoising import Denoising
from hookctl.loop.pipeline_hooks import PipelineHooks
from hookctl.run_state import remembering

_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_attending = Attending()


def enter(entry: Entry, target: Any) -> None:
    """Put a pipeline, or a bare denoiser, under a session's control in this thread or task.

    On any error `leave` undoes what was done so far.
    """
    entry.called = entry.elsewhere = entry.seen = entry.unseen = entry.stepless = False
    entry.expected.clear()
    entry.ran.clear()
    place = here.denoising_of_target(target, entry.pipe)
    with remembering(place.memory):
        for editor in entry.editors:
            with naming(editor.name, "attach"):
                editor.attach(target)
        engines = [Engine.of(model, name) for name, model in families.denoisers_of(target)]
        _check_alone(place, engines)
        attached = attach(entry, [(engine.model, engine.modules) for engine in engines])
        every = [site for engine in engines for site, _ in engine.modules.values()]
        editors = dict.fromkeys(a.editor for a in (*place.attached, *attached))
        check_conflicts([(editor, every) for editor in editors])
    place.add(entry, attached, [engine.model for engine in engines])
    here.enter(place)
    for engine in engines:
        entry.hooks.append(engine)
        engine.add(entry, tuple(one for one in attached if one.model is engine.model))
    if entry.pipe is not None:
        hooks = PipelineHooks.of(entry.pipe)
        entry.hooks.append(hooks)
        entry.refresh = hooks.sync
        hooks.add(entry)


def leave(entry: Entry, *, failed: bool = False, dropped: bool = False) -> None:
    """Take out all that a session put in, from wherever; failed: it ends by an error; dropped:
    whoever collects garbage takes it out, in the middle of anything.

    Done again, it does what an interrupt kept it from, and nothing else.
    """
    for place in list(entry.places):
        place.drop(entry)
    for hooks in entry.hooks:
        hooks.remove(entry, failed=failed)
    entry.refresh = _nothing
    entry.hooks.clear()
    entry.places.clear()
    here.forget_ended()
    if failed and not dropped:
        here.abandon()


def _nothing() -> None:
    pass


def _check_alone(place: Denoising, engines: Sequence[Engine]) -> None:
    """Raise UnsupportedError for a pipeline inside a context of its bare denoiser."""
    models = {engine.model for engine in engines}
    for other in here.denoisings():
        if other is not place and other.pipe is None and models & set(other.models):
            raise UnsupportedError(
                "control(pipe) inside control(pipe.unet): wrap the pipeline in both contexts"
            )


class Engine:
    """Owner of a denoiser's hooks.

    denoiser: as it was given, perhaps compiled; model: as it is; modules: its sites by path;
    ports: of those that are hooked.
    """

    def __init__(self, denoiser: nn.Module, name: str = "") -> None:
        self.denoiser, self.model = denoiser, families.uncompiled(denoiser)
        self.modules: Modules = {
            site.path: (site, module) for site, module in families.describe_sites(denoiser, name)
        }
        self.ports: dict[str, SitePort] = {}
        self.port = DenoiserPort(denoiser, self._around)
        self._attached: dict[Entry, tuple[Attached, ...]] = {}
        self._inside: dict[tuple[str, str], InsidePort] = {}  # by hook and path
        self._exchange = Exchange()
        self._installed = False

    @classmethod
    def of(cls, denoiser: nn.Module, name: str = "") -> Engine:
        """The owner of a denoiser's hooks; name: with which its sites' paths begin."""
        with lock:
            key = id(families.uncompiled(denoiser))
            engine = _engines.get(key)
            if engine is None:
                engine = _engines[key] = cls(denoiser, name)
            engine.follow({engine.model: denoiser})
            return engine

    def follow(self, held: Mapping[nn.Module, nn.Module]) -> None:
        """held: by model, as its pipeline holds it now: compiled anew perhaps, or plain again."""
        with lock:
            denoiser = held.get(self.model, self.denoiser)
            if denoiser is self.denoiser:
                return
            self.denoiser = denoiser
            if self._installed:
                self.port.remove()
                self.port = DenoiserPort(denoiser, self._around)
                self.port.install()
                forget_compiled()
            else:
                self.port = DenoiserPort(denoiser, self._around)

    def add(self, entry: Entry, attached: tuple[Attached, ...]) -> None:
        """A session wants its editors to be shown this denoiser's calls."""
        with lock:
            self._attached[entry] = attached
            self._sync(entry.pipe)

    def remove(self, entry: Entry, *, failed: bool = False) -> None:
        """A session has ended; failed: by an error."""
        with lock:
            self._attached.pop(entry, None)
            self._sync(entry.pipe)
            if failed:
                self._exchange.tidy()

    def _sync(self, pipe: Any) -> None:
        """Hook the denoiser if a session is there, and the sites and concats an editor wants.

        pipe: whose session came or went; it may hold the denoiser compiled by now.
        """
        if self._attached and not self._installed:
            self._exchange.remember(module for _, module in self.modules.values())
            self._installed = True
            self.port.install()
        attached = [one for several in self._attached.values() for one in several]
        changed, traced = self._sync_sites(set().union(*(a.sites for a in attached)))
        inside = self._sync_inside(attached)
        changed, traced = changed or inside[0], traced or inside[1]
        now: list[nn.Module] = []
        with contextlib.suppress(InputError):  # a pipeline that has none any more
            now = [] if pipe is None else [one for _, one in families.denoisers_of(pipe)]
        if traced or (changed and is_compiled(self.port, self.denoiser, *now)):
            # Code compiled before would never notice hooks that came or went.
            torch._dynamo.reset()
        if not self._attached and self._installed:
            self.port.remove()
            self.port = DenoiserPort(self.denoiser, self._around)
            self._installed = False

    def _sync_sites(self, wanted: set[str]) -> tuple[bool, bool]:
        """Whether any hook came or went, and whether compiled code calls one that went."""
        changed = traced = False
        for path in set(self.ports) - wanted:
            port = self.ports[path]
            traced |= port.traced
            changed = True
            with contextlib.suppress(KeyError):
                self._exchange.restore(path)
            port.remove()
            del self.ports[path]
        for path, (site, module) in self.modules.items():
            if path in wanted and path not in self.ports:
                port = SitePort(site, module, _attending, own_call=families.text_call(module))
                self.ports[path], changed = port, True
                port.install()
                self._exchange.watch(path, port)
        return changed, traced

    def _sync_inside(self, attached: Sequence[Attached]) -> tuple[bool, bool]:
        """As `_sync_sites`, of the layers that editors change."""
        wanted = {(hook, path) for a in attached for hook in a.inside for path in a.inside[hook]}
        if any(overrides(a.editor, "features") for a in attached):
            wanted |= {("features", concat.path) for concat in concats(self.model)}
        gone, missing = set(self._inside) - wanted, wanted - set(self._inside)
        traced = False
        for key in gone:
            traced |= self._inside[key].traced
            self._inside[key].remove()
            del self._inside[key]
        if missing:
            for key, port in ports_inside(self.model, self.modules, missing):
                self._inside[key] = port
                port.install()
        return bool(gone or missing), traced

    def refresh(self) -> None:
        """The model's processors may be others than before."""
        with lock:
            self._exchange.refresh()

    def _around(self, inner: Inner, args: Any, kwargs: Any) -> Any:
        again = calls.repeated(self.model)
        mine = here.denoising_of_call(self.model) if again is None else again.owner
        if mine is not None:
            return mine.around_denoiser(self, inner, args, kwargs)
        self._note_elsewhere()
        if calls.open is None:
            return inner(*args, **kwargs)
        with calls.hidden():
            return inner(*args, **kwargs)

    def _note_elsewhere(self) -> None:
        """Tell the sessions of the pipeline that is calling that it does so outside of them."""
        waiting = [entry for entry in list(self._attached) if not entry.called]
        if waiting:
            caller = here.calling_pipeline(self.model, [entry.pipe for entry in waiting])
            for entry in waiting:
                entry.elsewhere |= entry.pipe is None or caller is entry.pipe
