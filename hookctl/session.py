"""`control(...)`: into a pipeline with editors, and out again as it was found."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from hookctl.address import families
from hookctl.address.clock import Clock
from hookctl.address.sites import Site
from hookctl.arguments import checked, refusal
from hookctl.editor import Editor, check_editor
from hookctl.engine import enter, leave
from hookctl.errors import HoleError, HookctlWarning
from hookctl.evaluate.plan import check_backend
from hookctl.inspect.notebook import html_lines, html_table
from hookctl.loop.attached import Entry
from hookctl.maps import MapStore
from hookctl.report import HEADERS, Log, report


class Session:
    """A pipeline under control. Enter it, call the pipeline as ever, and look at what happened.

    sites: every attention site of the model; maps: the attention maps that were read, by word;
    clock: the time of the denoiser call in progress, or of the last one (None before the first);
    editors: in their order; log: what they did, which `report` puts into words.
    """

    @checked(own=("editors",))
    def __init__(
        self,
        target: Any,
        editors: Sequence[Editor],
        *,
        backend: str = "auto",
        strict: bool = True,
        rows: Sequence[str] | None = None,
        check_finite: bool = True,
        texts: Sequence[str] | None = None,
    ) -> None:
        for i, editor in enumerate(editors):
            check_editor(editor, f"editors[{i}]")
        check_backend(backend)
        if rows is not None and (not rows or "" in rows or len(set(rows)) < len(rows)):
            wanted = "the branches of the batch in order, each once, such as ('uncond', 'cond')"
            raise refusal("control: rows", rows, wanted)
        self.target, self.editors, self.backend, self.strict = target, editors, backend, strict
        self.denoiser = families.denoiser_of(target)
        pipe = None if target is self.denoiser else target
        if texts is not None and (not texts or pipe is None):
            wanted = "one for each of the embeddings that a pipeline is called with"
            raise refusal("control: texts", texts, wanted)
        given = None if rows is None else tuple(rows)
        self._entry = Entry(
            tuple(editors),
            pipe,
            backend,
            given,
            MapStore(),
            Log(),
            strict=strict,
            check_finite=check_finite,
            texts=None if texts is None else tuple(texts),
        )
        self._depth = 0
        self._sites = families.sites_of(target)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    @property
    def maps(self) -> MapStore:
        store: MapStore = self._entry.maps
        return store

    @property
    def log(self) -> Log:
        log: Log = self._entry.log
        return log

    @property
    def clock(self) -> Clock | None:
        return self._entry.clock

    def __enter__(self) -> Session:
        try:
            self._depth += 1
            if self._depth == 1:
                enter(self._entry, self.target)
            return self
        except BaseException:
            self._end(failed=True)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            entered, self._depth = self._depth, max(0, self._depth - 1)
            if entered == 1:
                self._end(failed=kind is not None)
        except BaseException:
            self._end(failed=True)  # an interrupt: what is left of it
            raise
        if entered == 1 and kind is None:
            self._check_run()

    def _end(self, *, failed: bool) -> None:
        self._depth = 0
        leave(self._entry, failed=failed)

    def _check_run(self) -> None:
        """Tell of edits that were lost."""
        entry = self._entry
        if entry.editors and entry.elsewhere and not entry.called:
            self._tell(
                f"{type(self.target).__name__} was called in another thread or task than the one "
                "that entered control(...), so it was not edited there. Enter control(...) where "
                "the pipeline is called, or call it within a copy of this context: "
                "contextvars.copy_context().run(pipe, ...) or asyncio.to_thread(pipe, ...)"
            )
        elif entry.editors and entry.unseen and not entry.seen:
            self._tell(
                f"the scheduler of this {type(self.target).__name__} took its steps, but no call "
                "of the denoiser was seen: code compiled before control(...) may be calling it. "
                "Call torch._dynamo.reset() after entering control(...), or compile before it"
            )
        elif entry.stepless and any(not editor.neutral() for editor in entry.editors):
            self._tell(
                f"{type(self.target).__name__} was called and ended without a call of its "
                "denoiser, so nothing was edited: no step was left to it; raise strength= or "
                "num_inference_steps="
            )
        if entry.called:
            for editor, why in self.log.lost(entry.editors):
                self._tell(f"{editor.name} changed nothing: {why}")
        silent = entry.silent_sites()
        if silent:
            self._tell(
                f"{len(silent)} edited sites never ran though the denoiser did, such as "
                f"{silent[0]!r}: their edits were lost. A cache or a compiled graph may be "
                "bypassing them; leave them out with sites=, or pass strict=False"
            )

    def _tell(self, lost: str) -> None:
        if self.strict:
            raise HoleError(lost)
        warnings.warn(lost, HookctlWarning, stacklevel=4)

    def __del__(self) -> None:
        if getattr(self, "_depth", 0):
            warnings.warn(
                f"{self!r} was dropped without leaving its context, and has ended; use "
                "`with hookctl.control(...):`",
                ResourceWarning,
                stacklevel=2,
            )
            self._depth = 0
            leave(self._entry, failed=True, dropped=True)

    def report(self) -> str:
        """What every editor did, where and at which steps, in attention (by which plan, and why)
        and round it; and which editors never acted, and why."""
        return report(self.log, self.editors)

    def __repr__(self) -> str:
        names = ", ".join(editor.name for editor in self.editors) or "no editors"
        clock = self.clock
        at = "not run yet"
        if clock is not None:
            at = f"last step {clock.step}" + (f" of {clock.steps}" if clock.steps else "")
        return f"<Session {type(self.target).__name__}: {names}; {len(self.sites)} sites; {at}>"

    def _repr_html_(self) -> str:
        rows = [*self.log.rows(), *self.log.hook_rows()]
        silent = [f"{name} never acted: {why}" for name, why in self.log.silent(self.editors)]
        shown = html_table(rows, HEADERS) if rows else ""
        maps = self.maps._repr_html_() if self.maps.records else ""
        return html_lines([repr(self)]) + shown + html_lines(silent) + maps


@checked(own=("editors",))
def control(
    target: Any,
    *editors: Editor,
    backend: str = "auto",
    strict: bool = True,
    rows: Sequence[str] | None = None,
    check_finite: bool = True,
    texts: Sequence[str] | None = None,
) -> Session:
    """Put a pipeline, or a bare denoiser, under the control of editors.

    Use it as a context manager; contexts nest, may end in any order, and each takes out exactly
    what it put in. A session belongs to the pipeline and to the thread or task that enters it:
    calls made elsewhere, or by other pipelines over the same weights, are plain.

    `backend`: "auto", "triton", "sdpa" or "reference" (explicit matrices in float64). `strict`:
    edits that were lost (a site that never ran, an editor that changed nothing, a pipeline called
    in another thread) are an error at the end, else a warning. `rows`: the branches of the batch in
    order, such as ("uncond", "cond"), for a denoiser called without its pipeline. `check_finite`:
    NaN and infinity end the run with an error that says where they began, at the cost of one
    reduction a step. `texts`: what the embeddings say that the pipeline is called with in place of
    prompts, one text for each, for editors that look for words; they are taken to be encoded as the
    pipeline would.
    """
    return Session(
        target,
        editors,
        backend=backend,
        strict=strict,
        rows=rows,
        check_finite=check_finite,
        texts=texts,
    )
