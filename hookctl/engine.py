"""One owner per denoiser: its sites, its editors, and the call in progress.

Contexts nest and end in any order; each adds its editors here and removes exactly those. When the
last one goes, everything is as it was found.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address import families
from hookctl.address.sites import Site
from hookctl.attention.sdpa_call import SDPACall
from hookctl.editor import Editor, check_conflicts, overrides
from hookctl.errors import HoleError, UnsupportedError
from hookctl.evaluate.one_call import EditedSite
from hookctl.evaluate.plan import Plan
from hookctl.hooks.attention import SitePort, depth, unwind
from hookctl.hooks.pipeline import DenoiserPort, Inner, PipelinePort, SchedulerPort, is_compiled
from hookctl.hooks.processors import Exchange
from hookctl.hooks.skips import Concat, ConcatPort, concats
from hookctl.loop.arguments import widen
from hookctl.loop.branches import add_branches, asked_branches, cut_branches
from hookctl.loop.calls import Call, Calls
from hookctl.loop.reach import sites_for
from hookctl.loop.run import Run
from hookctl.loop.state import FeatureCall, State, check_finite
from hookctl.loop.step import Step

Acting = tuple[tuple["Attached", ...], dict[str, EditedSite]]


@dataclass(eq=False)
class Attached:
    """One editor in one session, with the sites it was resolved to."""

    editor: Editor
    session: Any
    sites: frozenset[str]

    @property
    def backend(self) -> str:
        return str(self.session.backend)

    def note(self, site: Site, step: int, verbs: set[str], plan: Plan) -> None:
        self.session.log.note(self.editor, site, step, verbs, plan)


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
        self.order = families.joint_order(denoiser)
        self.attached: list[Attached] = []
        self._sessions: list[Any] = []
        self._ports: dict[str, SitePort] = {}
        self._concat_ports: list[ConcatPort] = []
        self._calls = Calls()
        self._local = threading.local()
        self._step = Step()
        self._exchange = Exchange()
        self._acting: dict[tuple[bool, ...], Acting] = {}
        self._denoiser_port: DenoiserPort | None = None
        self._pipeline_port: PipelinePort | None = None
        self._scheduler_port: SchedulerPort | None = None
        self._expected: set[str] = set()
        self._ran: set[str] = set()

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

    def add(self, session: Any, editors: Sequence[Editor]) -> None:
        """Attach a session's editors; on any error nothing has changed."""
        with _lock:
            new = [
                Attached(editor, session, sites_for(editor, self.model, self.modules))
                for editor in editors
            ]
            check_conflicts([(a.editor, self.sites) for a in self.attached + new])
            first = not self._sessions
            if first:
                self.run = Run(self.pipe, self.denoiser)
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

    def remove(self, session: Any, *, failed: bool = False) -> None:
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
        self._acting = {}
        given = [s.rows for s in self._sessions if s.rows is not None]
        self.run.branches = given[-1] if given else None
        self._sync_ports()

    def _install(self) -> None:
        self._denoiser_port = DenoiserPort(self.denoiser, self._around_denoiser)
        if self.pipe is not None:
            self._pipeline_port = PipelinePort(
                self.pipe, self.run.restart, self.run.prepared, self.run.texts
            )
            self._hook_scheduler()

    def _hook_scheduler(self) -> None:
        scheduler = getattr(self.pipe, "scheduler", None)
        port = self._scheduler_port
        if port is not None and port.scheduler is scheduler:
            return
        if port is not None:
            port.remove()
        self._scheduler_port = (
            SchedulerPort(scheduler, self._around_step, self.run.scaled)
            if hasattr(scheduler, "step")
            else None
        )

    def _uninstall(self) -> None:
        for port in (self._denoiser_port, self._pipeline_port, self._scheduler_port):
            if port is not None:
                port.remove()
        self._denoiser_port = self._pipeline_port = self._scheduler_port = None
        self._step.clear()

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
                self._ports[path] = SitePort(site, module, self, own_call=own)
                self._exchange.watch(path, self._ports[path])
        features = any(overrides(a.editor, "features") for a in self.attached)
        if features != bool(self._concat_ports):
            changed = True
            traced |= any(port.traced for port in self._concat_ports)
            for concat_port in self._concat_ports:
                concat_port.remove()
            found = concats(self.model) if features else ()
            self._concat_ports = [ConcatPort(c, self._edit_features) for c in found]
        now = families.denoiser_of(self.pipe) if self.pipe is not None else self.denoiser
        if traced or (changed and is_compiled(self._denoiser_port, self.denoiser, now)):
            # Code compiled before would never notice hooks that came or went.
            torch._dynamo.reset()

    def silent_sites(self, session: Any) -> tuple[str, ...]:
        """Sites that an editor of the session was to be shown, but that never ran."""
        return tuple(
            sorted(
                path
                for path in self._expected - self._ran
                if any(path in a.sites for a in self.attached if a.session is session)
            )
        )

    # -- the denoiser call ---------------------------------------------------------------------

    def _around_denoiser(self, inner: Inner, args: Any, kwargs: Any) -> Any:
        if again := self._calls.repeated():
            # Checkpointing round the whole call: the same rows, clock and editors once more.
            state = self.run.repeat(again.state, args, kwargs)
            call = Call(state, again.acting, again.by_site, repeated=True)
            return cut_branches(state, self._within(call, inner, args, kwargs))
        outer, port = self._calls.open, self._denoiser_port
        nesting = outer.state if outer is not None else self._stepping()
        state = self.run.state(args, kwargs, port.branch if port else None, nesting)
        if self.pipe is not None:
            self._hook_scheduler()
        self._exchange.refresh()
        if self.run.fresh and nesting is None:
            self._begin(state)
        if not state.nested:
            for session in self._sessions:
                session.clock = state.clock
        call = Call(state, *self._acting_at(state))
        if state.reading is not None:
            self._calls.follow(call, state.reading)
        out = self._within(call, inner, args, kwargs)
        if call.by_site and not call.ran:
            raise HoleError(
                "none of the edited attention sites ran in a denoiser call: a compiled graph or a "
                "cache is bypassing the model. Call torch._dynamo.reset(), or compile inside "
                "control()"
            )
        self._expected |= set(call.by_site)
        self._ran |= call.ran
        if torch.is_grad_enabled():
            acting = set(call.acting)
            self._calls.keep(call, out, self.model, lambda: acting <= set(self.attached))
        if not state.nested:
            wanted = any(overrides(a.editor, "combine") for a in call.acting)
            self._step.note(state, out, predictions=wanted)
        return cut_branches(state, out)

    def _begin(self, state: State) -> None:
        """The first denoiser call of a run."""
        check_finite(state.kwargs[state.sample])
        for session in self._sessions:
            session.maps.clear()
        for attached in self.attached:
            state.maps = attached.session.maps
            attached.editor.begin(state)
        self.run.fresh = False

    def _within(self, call: Call, inner: Inner, args: Any, kwargs: Any) -> Any:
        entered = depth()
        with self._calls.during(call):
            try:
                return self._call(inner, call, args, kwargs)
            except BaseException:
                unwind(entered)
                raise

    def _call(self, inner: Inner, call: Call, args: Any, kwargs: Any) -> Any:
        state = call.state
        around: list[Editor] = []
        if not state.nested:
            for a in call.acting:
                if overrides(a.editor, "before"):
                    a.editor.before(state)
            around = [a.editor for a in call.acting if overrides(a.editor, "denoise")]
            adding = [a.editor for a in call.acting if overrides(a.editor, "branches")]
            wishes = [(editor.name, editor.branches(state)) for editor in adding]
            if asked := asked_branches(wishes, state):
                add_branches(state, asked)
        extra: dict[str, Tensor] = {}
        for a in call.acting:
            if overrides(a.editor, "context"):
                extra |= dict(a.editor.context(state) or {})
        if extra:
            widen(state, extra)
        untouched = state.assigned is None and state.own_rows is None
        if not around and not extra and untouched:
            return self._inner(inner, call, args, kwargs)

        def proceed(rest: Sequence[Editor] = tuple(around)) -> Any:
            if rest:
                return rest[0].denoise(state, lambda: proceed(rest[1:]))
            return self._inner(inner, call, *self.run.arguments(state))

        return proceed()

    def _inner(self, inner: Inner, call: Call, args: Any, kwargs: Any) -> Any:
        """The model itself; spelled-out attention, and a call that may end early, can be followed
        in uncompiled code only."""
        port = self._denoiser_port
        reading = call.state.reading
        eager = (reading is not None and reading.reader is not None) or any(
            self._ports[path].spelled_out for path in call.by_site
        )
        if port is not None and eager:
            with port.eagerly():
                return inner(*args, **kwargs)
        return inner(*args, **kwargs)

    def _acting_at(self, state: State) -> Acting:
        """The editors that act now, and per site those that are shown its calls."""
        key = tuple(a.editor.active(state.clock) for a in self.attached)
        if key not in self._acting:
            acting = tuple(a for a, on in zip(self.attached, key, strict=True) if on)
            shown: dict[str, EditedSite] = {}
            for path, port in self._ports.items():
                if here := [a for a in acting if path in a.sites]:
                    shown[path] = EditedSite(
                        port.site,
                        here,
                        port.own_call,
                        self.order,
                        partial(families.keeps_perturbed, port.module),
                    )
            self._acting[key] = (acting, shown)
        return self._acting[key]

    # -- attention -----------------------------------------------------------------------------

    def watching(self, site: Site) -> bool:
        call = self._calls.current
        if call is None:
            return False
        call.ran.add(site.path)
        return site.path in call.by_site

    def batch(self) -> int:
        call = self._calls.current
        return len(call.state.rows) if call is not None else 1

    def attend(
        self,
        port: SitePort,
        index: int,
        given: SDPACall,
        original: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Show one caught call to its editors and evaluate what they made of it."""
        call = self._calls.current
        assert call is not None  # `watching` said so
        edited = call.by_site[port.site.path]
        return edited.output(
            given, original, call.state, index=index, repeated=self._calls.repeats(call)
        )

    # -- features ------------------------------------------------------------------------------

    def _edit_features(
        self, concat: Concat, backbone: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Both parts of a concat after its editors, or None if nobody changed any."""
        current = self._calls.current
        edits = [] if current is None else current.acting
        edits = [a.editor for a in edits if overrides(a.editor, "features")]
        if current is None or not edits:
            return None
        state = current.state
        place = concat.block, concat.place, concat.order, concat.resolution
        call = FeatureCall(backbone, skip, state.rows, state.clock, *place)
        for editor in edits:
            editor.features(call)
        unchanged = call.backbone is backbone and call.skip is skip
        return None if unchanged else (call.backbone, call.skip)

    # -- the scheduler's step ------------------------------------------------------------------

    def _stepping(self) -> State | None:
        """The state of the step whose end this thread's editors are working on."""
        return getattr(self._local, "stepping", None)

    def _around_step(self, step: Inner, arguments: dict[str, Any]) -> Any:
        state = self._step.state
        editors = [a.editor for a in self._acting_at(state)[0]] if state is not None else []
        self._local.stepping = state
        try:
            return self._step.take(step, arguments, editors)
        finally:
            self._local.stepping = None
            self.run.stepped()
