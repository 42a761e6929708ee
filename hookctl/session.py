"""`control(...)`: into a pipeline with editors, and out again as it was found."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from hookctl.address import families
from hookctl.address.clock import Clock
from hookctl.address.sites import Site
from hookctl.editor import Editor, check_editor
from hookctl.engine import Engine
from hookctl.errors import HoleError
from hookctl.evaluate.plan import check_backend
from hookctl.inspect.notebook import html_lines, html_table
from hookctl.maps import MapStore
from hookctl.report import HEADERS, Log, report


class Session:
    """A pipeline under control. Enter it, call the pipeline as ever, and look at what happened.

    sites: every attention site of the model; maps: the attention maps that were read, by word;
    clock: the time of the denoiser call in progress, or of the last one (None before the first);
    editors: in their order; log: what they did, which `report` puts into words.
    """

    def __init__(
        self,
        target: Any,
        editors: Sequence[Editor],
        *,
        backend: str = "auto",
        strict: bool = True,
        rows: Sequence[str] | None = None,
    ) -> None:
        for i, editor in enumerate(editors):
            check_editor(editor, f"editors[{i}]")
        check_backend(backend)
        self.target, self.editors, self.backend, self.strict = target, editors, backend, strict
        self.denoiser = families.denoiser_of(target)
        self.rows = None if rows is None else tuple(rows)
        self.maps = MapStore()
        self.log = Log()
        self.clock: Clock | None = None
        self._engine: Engine | None = None
        self._depth = 0
        self._sites = tuple(site for site, _ in families.describe_sites(self.denoiser))

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    def __enter__(self) -> Session:
        if self._depth == 0:
            for editor in self.editors:
                editor.attach(self.target)
            pipe = None if self.target is self.denoiser else self.target
            engine = Engine.of(self.denoiser, pipe)
            engine.add(self, self.editors)
            self._engine = engine
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth or self._engine is None:
            return
        engine, self._engine = self._engine, None
        silent = engine.silent_sites(self) if self.strict and kind is None else ()
        engine.remove(self, failed=kind is not None)
        if silent:
            raise HoleError(
                f"{len(silent)} edited sites never ran though the denoiser did, such as "
                f"{silent[0]!r}: their edits were lost. A cache or a compiled graph may be "
                "bypassing them; leave them out with sites=, or pass strict=False"
            )

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


def control(
    target: Any,
    *editors: Editor,
    backend: str = "auto",
    strict: bool = True,
    rows: Sequence[str] | None = None,
) -> Session:
    """Put a pipeline, or a bare denoiser, under the control of editors.

    Use it as a context manager; contexts nest, may end in any order, and each takes out exactly
    what it put in. `backend`: "auto", "triton", "sdpa" or "reference" (explicit matrices in
    float64). `strict`: an edited site that never runs is an error. `rows`: the branches of the
    batch in order, such as ("uncond", "cond"), for a denoiser called without its pipeline.
    """
    return Session(target, editors, backend=backend, strict=strict, rows=rows)
