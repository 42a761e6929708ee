"""What happens in the denoiser calls and steps of a run while editors are attached."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address import families
from hookctl.address.sites import Site
from hookctl.attention.sdpa_call import SDPACall
from hookctl.editor import overrides, tell
from hookctl.evaluate.one_call import EditedSite
from hookctl.hooks.attention import SitePort, depth, unwind
from hookctl.hooks.pipeline import DenoiserPort, Inner
from hookctl.hooks.skips import Concat
from hookctl.loop import around
from hookctl.loop.arguments import widen
from hookctl.loop.attached import Attached, Session
from hookctl.loop.branches import add_branches, asked_branches, cut_branches
from hookctl.loop.calls import Call, Calls
from hookctl.loop.missed import Missed, is_strict
from hookctl.loop.run import Run
from hookctl.loop.state import FeatureCall, State, check_finite
from hookctl.loop.step import Step

Acting = tuple[tuple[Attached, ...], dict[str, EditedSite]]


class Denoising:
    """Hands what the hooks catch to the editors, and what they make of it back to the model.

    ports: the hooked sites by path, as the engine keeps them; refresh: looks after hooks that the
    pipeline may have changed meanwhile. sessions, attached: those of now; port: the hook of the
    denoiser, where it is in.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        pipe: Any,
        ports: Mapping[str, SitePort],
        refresh: Callable[[], None],
    ) -> None:
        self.model, self.run = families.uncompiled(denoiser), Run(pipe, denoiser)
        self.sessions: Sequence[Session] = ()
        self.attached: Sequence[Attached] = ()
        self.port: DenoiserPort | None = None
        self._order = families.joint_order(denoiser)
        self._ports, self._refresh = ports, refresh
        self._calls, self._step, self._missed = Calls(), Step(), Missed()
        self._local = threading.local()
        self._acting: dict[tuple[bool, ...], Acting] = {}
        self._expected: set[str] = set()
        self._ran: set[str] = set()

    def changed(self, sessions: Sequence[Session], attached: Sequence[Attached]) -> None:
        """Other sessions and editors from now on."""
        self.sessions, self.attached, self._acting = sessions, attached, {}
        given = [s.rows for s in sessions if s.rows is not None]
        self.run.branches = given[-1] if given else None

    def over(self) -> None:
        """The last session has ended."""
        self._step.clear()

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

    def around_denoiser(self, inner: Inner, args: Any, kwargs: Any) -> Any:
        if again := self._calls.repeated():
            # Checkpointing round the whole call: the same rows, clock and editors once more.
            state = self.run.repeat(again.state, args, kwargs)
            call = Call(state, again.acting, again.by_site, repeated=True)
            return cut_branches(state, self._within(call, inner, args, kwargs))
        outer, port = self._calls.open, self.port
        nesting = outer.state if outer is not None else self._stepping()
        state = self.run.state(args, kwargs, port.branch if port else None, nesting)
        self._refresh()
        if self.run.fresh and nesting is None:
            self._begin(state)
        if not state.nested:
            for session in self.sessions:
                session.clock = state.clock
                session.log.note_call(state.clock)
        call = Call(state, *self._acting_at(state))
        if state.reading is not None:
            self._calls.follow(call, state.reading)
        self._missed.before(self.model, call)
        out = self._within(call, inner, args, kwargs)
        self._missed.after(call)
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
        for session in self.sessions:
            session.maps.clear()
        for attached in self.attached:
            state.maps = attached.session.maps
            tell(attached.editor, "begin", state)
        self.run.fresh = False

    def _within(self, call: Call, inner: Inner, args: Any, kwargs: Any) -> Any:
        entered = depth()
        with self._calls.during(call):
            try:
                return self._call(inner, call, args, kwargs)
            finally:
                unwind(entered)

    def _call(self, inner: Inner, call: Call, args: Any, kwargs: Any) -> Any:
        state = call.state
        standing: list[Attached] = []
        if not state.nested:
            for a in call.acting:
                if overrides(a.editor, "before"):
                    around.before(a, state)
            standing = [a for a in call.acting if overrides(a.editor, "denoise")]
            adding = [a for a in call.acting if overrides(a.editor, "branches")]
            wishes = [(a.editor.name, around.added(a, "branches", state)) for a in adding]
            if asked := asked_branches(wishes, state):
                add_branches(state, asked)
        extra: dict[str, Tensor] = {}
        for a in call.acting:
            if overrides(a.editor, "context"):
                extra |= around.added(a, "context", state)
        if extra:
            widen(state, extra)
        untouched = state.assigned is None and state.own_rows is None
        if not standing and not extra and untouched:
            return self._inner(inner, call, args, kwargs)

        def proceed(rest: Sequence[Attached] = tuple(standing)) -> Any:
            if rest:
                return around.denoise(rest[0], state, lambda: proceed(rest[1:]))
            return self._inner(inner, call, *self.run.arguments(state))

        return proceed()

    def _inner(self, inner: Inner, call: Call, args: Any, kwargs: Any) -> Any:
        """The model itself; spelled-out attention, and a call that may end early, can be followed
        in uncompiled code only."""
        port = self.port
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
                        self._order,
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

    def is_strict(self) -> bool:
        call = self._calls.current
        return call is None or is_strict(call)

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

    def edit_features(
        self, concat: Concat, backbone: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Both parts of a concat after its editors, or None if nobody changed any."""
        current = self._calls.current
        edits = [] if current is None else current.acting
        edits = [a for a in edits if overrides(a.editor, "features")]
        if current is None or not edits:
            return None
        state = current.state
        place = concat.block, concat.place, concat.order, concat.resolution
        call = FeatureCall(backbone, skip, state.rows, state.clock, *place)
        for a in edits:
            around.features(a, call)
        unchanged = call.backbone is backbone and call.skip is skip
        return None if unchanged else (call.backbone, call.skip)

    # -- the scheduler's step ------------------------------------------------------------------

    def _stepping(self) -> State | None:
        """The state of the step whose end this thread's editors are working on."""
        return getattr(self._local, "stepping", None)

    def around_step(self, step: Inner, arguments: dict[str, Any]) -> Any:
        state = self._step.state
        acting = self._acting_at(state)[0] if state is not None else ()
        self._local.stepping = state
        try:
            return self._step.take(step, arguments, acting)
        finally:
            self._local.stepping = None
            self.run.stepped()
