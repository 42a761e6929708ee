"""`control(...)`: into a pipeline with editors, and out again as it was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from hookctl.address import families
from hookctl.address.clock import Clock
from hookctl.address.sites import Site
from hookctl.editor import Editor
from hookctl.engine import Engine
from hookctl.errors import HoleError, InputError
from hookctl.evaluate.plan import Plan, check_backend
from hookctl.inspect.tables import table
from hookctl.maps import MapStore


@dataclass(eq=False)
class Log:
    """Which editor touched which site at which steps, by which plan."""

    entries: dict[tuple[int, str, Plan], tuple[Editor, Site, set[str], set[int]]] = field(
        default_factory=dict
    )

    def note(self, editor: Editor, site: Site, step: int, verbs: set[str], plan: Plan) -> None:
        key = (id(editor), site.path, plan)
        entry = self.entries.setdefault(key, (editor, site, set(), set()))
        entry[2].update(verbs)
        entry[3].add(step)

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                editor.name,
                site.label,
                ", ".join(sorted(verbs)),
                _spans(sorted(steps)),
                plan.name,
                plan.reason,
            )
            for (_, _, plan), (editor, site, verbs, steps) in self.entries.items()
        ]


def _spans(steps: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'"""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


class Session:
    """A pipeline under control. Enter it, call the pipeline as ever, and look at what happened.

    sites: every attention site of the model; maps: the attention maps that were read, by word;
    clock: the time of the denoiser call in progress, or of the last one (None before the first);
    log: who touched what.
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
            if not isinstance(editor, Editor):
                given = f"the class {editor.__name__}" if isinstance(editor, type) else repr(editor)
                raise InputError(f"editors[{i}] is {given}; give instances of hookctl.Editor")
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
        """A table: editor, site, verbs, steps, plan and why."""
        rows = self.log.rows()
        if not rows:
            return "no editor touched any attention site"
        return table(rows, ("editor", "site", "verbs", "steps", "plan", "reason"))


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
