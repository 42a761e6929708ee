"""What happens in the denoiser calls and steps of a pipeline while editors are attached to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hookctl.address import families
from hookctl.editor import overrides, tell
from hookctl.errors import UnsupportedError
from hookctl.evaluate.one_call import EditedSite
from hookctl.hooks.attention import SitePort, depth, unwind
from hookctl.hooks.offloading import check_held
from hookctl.hooks.pipeline import DenoiserPort, Inner, forget_compiled
from hookctl.loop import around
from hookctl.loop.arguments import widen
from hookctl.loop.attached import Attached, Entry
from hookctl.loop.branches import add_branches, asked_branches, cut_branches
from hookctl.loop.calls import Call, calls
from hookctl.loop.finite import check_latents
from hookctl.loop.missed import Missed
from hookctl.loop.residuals import add_residuals
from hookctl.loop.run import Run
from hookctl.loop.state import State
from hookctl.loop.step import Step
from hookctl.loop.text_rows import add_text_rows, cut_text_rows
from hookctl.run_state import Memory, remembering

Acting = tuple[tuple[Attached, ...], dict[str, EditedSite]]


class Hooked(Protocol):
    """A denoiser with hooks in it, as the engine keeps it.

    denoiser: as it was given, perhaps compiled; model: as it is; ports: of its hooked sites, by
    path; port: of its calls.
    """

    denoiser: nn.Module
    model: nn.Module
    port: DenoiserPort

    @property
    def ports(self) -> Mapping[str, SitePort]: ...

    def refresh(self) -> None:
        """Look after hooks that the pipeline may have changed meanwhile."""


class Denoising:
    """A pipeline under control in one thread or task: its sessions, its run and their editors.

    target, pipe: what is under control, and as a pipeline (None for a bare denoiser); home: where
    (`here.whereabouts`); models: its denoisers. memory: what the editors know of it.
    """

    def __init__(self, target: Any, pipe: Any, home: tuple[int, int | None]) -> None:
        self.target, self.pipe, self.home = target, pipe, home
        self.entries: tuple[Entry, ...] = ()
        self.attached: tuple[Attached, ...] = ()
        self.models: tuple[nn.Module, ...] = ()
        self.memory = Memory()
        self.run = Run(pipe)
        self._step, self._missed = Step(), Missed()
        self._stepping: State | None = None  # of the step whose end the editors are working on
        self._acting: dict[tuple[Any, ...], Acting] = {}
        self._traced_anew: set[nn.Module] = set()

    # -- sessions ------------------------------------------------------------------------------

    def add(self, entry: Entry, attached: Sequence[Attached], models: Sequence[nn.Module]) -> None:
        """A session is entered here."""
        entry.places.add(self)
        self.models = tuple(dict.fromkeys((*self.models, *models)))
        self.attached += tuple(attached)
        self.entries += (entry,)
        self._changed()

    def drop(self, entry: Entry) -> None:
        """A session has ended; with the last one everything is let go of."""
        self.entries = tuple(one for one in self.entries if one is not entry)
        self.attached = tuple(one for one in self.attached if one.entry is not entry)
        self._changed()
        if not self.entries:
            self.target = self.pipe = None
            self.models = ()
            self.memory.clear()
            self.run = Run(None)
            self._step.clear()

    def fork(self, home: tuple[int, int | None]) -> Denoising:
        """The same sessions in a copy of this context, with a run of their own."""
        made = Denoising(self.target, self.pipe, home)
        made.memory = self.memory.copy()
        for entry in self.entries:
            own = [one for one in self.attached if one.entry is entry]
            made.add(entry, own, self.models)
        return made

    def _changed(self) -> None:
        self._acting = {}
        self._traced_anew = set()
        given = [entry.rows for entry in self.entries if entry.rows is not None]
        self.run.branches = given[-1] if given else None
        stated = [entry.texts for entry in self.entries if entry.texts is not None]
        self.run.stated = stated[-1] if stated else ()

    def restarted(self, checked: dict[str, Any] | None = None) -> None:
        """The pipeline was called; checked: what it checks of its call, by name."""
        self._check_models()
        self.run.restart(checked)

    def prepared(self) -> None:
        """The pipeline prepares a run: a new one, if the last has got as far as the denoiser."""
        if self.run.keeper.running:
            self.restarted()

    def _check_models(self) -> None:
        """Raise UnsupportedError if the pipeline has another denoiser than was brought here."""
        for _, one in families.denoisers_of(self.pipe):
            if families.uncompiled(one) not in self.models:
                raise UnsupportedError(
                    f"the denoiser of this {type(self.pipe).__name__} was replaced by another "
                    f"{type(one).__name__} inside control(...), whose edits it would not see; "
                    "replace it before, or enter another control(...)"
                )

    # -- the denoiser call ---------------------------------------------------------------------

    def around_denoiser(self, hooked: Hooked, inner: Inner, args: Any, kwargs: Any) -> Any:
        with remembering(self.memory):
            return self._around_denoiser(hooked, inner, args, kwargs)

    def _around_denoiser(self, hooked: Hooked, inner: Inner, args: Any, kwargs: Any) -> Any:
        if again := calls.repeated(hooked.model):
            # Checkpointing round the whole call: the same rows, clock and editors once more.
            state = self.run.repeat(again.state, args, kwargs)
            call = Call(state, again.acting, again.by_site, self, repeated=True)
            return cut_branches(state, self._within(call, hooked, inner, args, kwargs))
        outer = calls.open
        nesting = outer.state if outer is not None and outer.owner is self else self._stepping
        if self.run.fresh:
            check_held(hooked.model, type(hooked.model).__name__)
        branch = hooked.port.branch
        state = self.run.state(hooked.denoiser, args, kwargs, branch, nesting)
        hooked.refresh()
        for entry in self.entries:
            entry.refresh()
            entry.seen = True
        if self.run.fresh and nesting is None:
            self._begin(state)
        if not state.nested:
            for entry in self.entries:
                entry.clock = state.clock
                entry.log.note_call(state.clock)
        call = Call(state, *self._acting_at(state, hooked), self)
        if state.reading is not None:
            calls.follow(call, state.reading)
        self._missed.before(hooked.model, call)
        out = self._within(call, hooked, inner, args, kwargs)
        for entry in self.entries:
            entry.called |= not state.nested  # a call that failed lost no edit
        self._missed.after(hooked.model, call)
        for one in set(call.acting).intersection(self.attached):
            one.entry.expected |= one.sites & set(call.by_site)
            one.entry.ran |= call.ran
        if torch.is_grad_enabled():
            acting = set(call.acting)
            calls.keep(call, out, hooked.model, lambda: acting <= set(self.attached))
        if not state.nested:
            wanted, awaited = (
                any(overrides(a.editor, hook) for a in call.acting) for hook in ("combine", "after")
            )
            self._step.note(state, hooked, out, predictions=wanted, awaited=awaited)
        return cut_branches(state, out)

    def _begin(self, state: State) -> None:
        """The first denoiser call of a run."""
        self._step.clear()  # of a run that ended between a call and its step
        check_latents(state.kwargs[state.sample])
        for entry in self.entries:
            entry.maps.clear()
        for editor, entry in {(a.editor, a.entry): None for a in self.attached}:
            state.maps = entry.maps
            tell(editor, "begin", state)
        self.run.fresh = False

    def _within(self, call: Call, hooked: Hooked, inner: Inner, args: Any, kwargs: Any) -> Any:
        entered = depth()
        with calls.during(call):
            try:
                return self._call(hooked, inner, call, args, kwargs)
            finally:
                unwind(entered)

    def _call(self, hooked: Hooked, inner: Inner, call: Call, args: Any, kwargs: Any) -> Any:
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
        record = families.model_of(hooked.denoiser)
        if extra and record is not None and record.text_rows:
            add_text_rows(state, extra)
        elif extra:
            widen(state, extra)
        for a in call.acting:
            if overrides(a.editor, "residuals"):
                add_residuals(state, around.residuals(a, state))
        untouched = state.assigned is None and state.own_rows is None and state.residuals is None
        if not standing and not extra and untouched and not state.other_texts:
            return self._inner(hooked, inner, call, args, kwargs)

        def proceed(rest: Sequence[Attached] = tuple(standing)) -> Any:
            if rest:
                return around.denoise(rest[0], state, lambda: proceed(rest[1:]))
            changed = self.run.arguments(state)
            return cut_text_rows(state, self._inner(hooked, inner, call, *changed))

        return proceed()

    def _inner(self, hooked: Hooked, inner: Inner, call: Call, args: Any, kwargs: Any) -> Any:
        """The model itself; once more where compiled code of before the hooks left out them all."""
        out = _model_called(hooked, inner, call, args, kwargs)
        bypassed = call.by_site and not call.ran and hooked.model not in self._traced_anew
        if bypassed and forget_compiled():
            out = _model_called(hooked, inner, call, args, kwargs)
        self._traced_anew.add(hooked.model)
        return out

    def _acting_at(self, state: State, hooked: Hooked) -> Acting:
        """The editors that act now, and per site those that are shown its calls."""
        here = [a for a in self.attached if a.model is hooked.model]
        key = (hooked.model, *(a.editor.active(state.clock) for a in here))
        if key not in self._acting:
            acting = tuple(a for a, on in zip(here, key[1:], strict=True) if on)
            shown: dict[str, EditedSite] = {}
            order = families.joint_order(hooked.denoiser)
            for path, port in list(hooked.ports.items()):
                if shown_to := [a for a in acting if path in a.sites]:
                    shown[path] = EditedSite(
                        port.site,
                        shown_to,
                        port.own_call,
                        order,
                        partial(families.keeps_perturbed, port.module),
                    )
            self._acting[key] = (acting, shown)
        return self._acting[key]

    # -- the scheduler's step ------------------------------------------------------------------

    @property
    def stepping_next(self) -> bool:
        """Whether a denoiser call waits for its step."""
        return self._step.state is not None

    def around_step(self, step: Inner, arguments: dict[str, Any]) -> Any:
        state, hooked = self._step.state, self._step.hooked
        if self._step.is_estimated(arguments):
            return step(**arguments)
        if state is None and self.run.fresh:
            for entry in self.entries:
                entry.unseen = True
        acting = self._acting_at(state, hooked)[0] if state is not None else ()
        check = all(entry.check_finite for entry in self.entries)
        self._stepping = state
        try:
            with remembering(self.memory):
                return self._step.take(step, arguments, acting, check=check)
        finally:
            self._stepping = None
            self.run.stepped()


def _model_called(hooked: Hooked, inner: Inner, call: Call, args: Any, kwargs: Any) -> Any:
    """The model itself; spelled-out attention, and a call that may end early, can be followed in
    uncompiled code only."""
    reading = call.state.reading
    eager = (reading is not None and reading.reader is not None) or any(
        hooked.ports[path].spelled_out for path in call.by_site
    )
    if eager:
        with hooked.port.eagerly():
            return inner(*args, **kwargs)
    return inner(*args, **kwargs)
