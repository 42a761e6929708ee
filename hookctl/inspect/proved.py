"""Declared beside measured: what a record says of a pipeline, and what the pipeline shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hookctl.address.families.prove import WORD, CallShown, Shown, prove
from hookctl.address.families.traces import PROMPTS, Drawn, Run
from hookctl.address.pipelines import text_streams
from hookctl.address.rows import COND, Row, Rows
from hookctl.address.text import TextLayout
from hookctl.attention.call import AttentionCall
from hookctl.editor import Editor
from hookctl.errors import HookctlError
from hookctl.inspect.tables import table
from hookctl.session import control

Span = tuple[int, int] | None


@dataclass(frozen=True)
class Fact:
    """One fact; agrees: None where nothing is declared, or nothing was seen."""

    what: str
    declared: str
    measured: str
    agrees: bool | None


@dataclass(frozen=True)
class Proved:
    """Every fact that was compared."""

    facts: tuple[Fact, ...]

    @property
    def wrong(self) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.facts if fact.agrees is False)

    def data(self) -> list[dict[str, Any]]:
        return [vars(fact) for fact in self.facts]

    def lines(self) -> Iterator[str]:
        marks = {True: "agrees", False: "DIFFERS", None: ""}
        rows = [(f.what, f.declared, f.measured, marks[f.agrees]) for f in self.facts]
        yield table(rows, ("", "declared", "measured", ""))


class _Sites(Editor):
    """Keeps the kind and the spans of each site's first call."""

    def __init__(self) -> None:
        self.sites = lambda site: True
        self.found: dict[str, tuple[str, Span, Span, Span] | str] = {}

    def attention(self, call: AttentionCall) -> None:
        path = call.site.path
        if path in self.found:
            return
        try:
            spans = call.spans
        except HookctlError as error:
            self.found[path] = str(error)
            return
        self.found[path] = (call.site.kind, spans.image_queries, spans.image_keys, spans.text_keys)


class _Rows(Editor):
    """Keeps the rows of each call, and how long the text is."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self.tokens: int | None = None

    def denoise(self, state: Any, proceed: Any) -> Any:
        self.rows.append(state.rows)
        self.tokens = state.own_text if self.tokens is None else self.tokens
        return proceed()


def proved(pipe: Any, run: Run) -> Proved:
    """Compare a pipeline's record with what a few runs show; run: draws a step or more with it."""
    shown = prove(pipe, run)
    asked = Drawn() if shown.prompts == 2 else Drawn().one()
    rows, sites = _Rows(), _Sites()
    try:
        with control(pipe, rows, sites, strict=False):
            run(asked)
    except HookctlError as error:
        return Proved((Fact("a run", "", str(error), False),))
    return Proved(
        (
            *_calls(shown, rows.rows),
            *_kinds(pipe, shown, sites.found),
            _words(pipe, shown, rows.tokens),
        )
    )


def _calls(shown: Shown, rows: list[Rows]) -> Iterator[Fact]:
    for n, (call, declared) in enumerate(zip(shown.calls, rows, strict=False)):
        # Priors draw their negative prompt as a further one.
        fitting = [row.prompt >= shown.prompts or _fits(row, call, declared) for row in declared]
        agrees = len(declared) == len(call.rows) and all(fitting)
        measured = " ".join(call.rows)
        yield Fact(f"call {n + 1} of a step, {call.denoiser}", repr(declared), measured, agrees)


def _fits(row: Row, call: CallShown, rows: Rows) -> bool:
    """Whether what a row follows is what its tags say: a conditional row follows its prompt, any
    other does not; it follows no other prompt's seed."""
    if row.index >= len(call.rows):
        return False
    tag, mine = call.rows[row.index], f"P{row.prompt + 1}"
    others = {f"P{r.prompt + 1}" for r in rows} - {mine}
    if any(other in tag for other in others):
        return False
    said = any("P" in other for other in call.rows) or any("N" in other for other in call.rows)
    conditional = row.role == COND or row.branch == "modality"
    return not said or (mine in tag) == conditional


def _kinds(pipe: Any, shown: Shown, found: dict[str, Any]) -> Iterator[Fact]:
    """One line for all sites alike."""
    lines: dict[tuple[str, str, bool | None], list[str]] = {}
    for (name, path), site in shown.sites.items():
        spans = f"{site.kind}, queries {_text(site.image_queries)}, keys {_text(site.image_keys)}"
        said = found.get(path, found.get(f"{name}.{path}"))
        if said is None:
            lines.setdefault(("not shown to editors", spans, None), []).append(path)
            continue
        if isinstance(said, str):
            lines.setdefault((said, spans, None), []).append(path)
            continue
        kind, queries, keys, text = said
        declared = f"{kind}, queries {_text(queries)}, keys {_text(keys)}"
        lines.setdefault((declared, spans, _agree(said, site)), []).append(path)
    for (declared, measured, agrees), paths in lines.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield Fact(paths[0] + more, declared, measured, agrees)


def _agree(said: tuple[str, Span, Span, Span], site: Any) -> bool | None:
    kind, queries, keys, text = said
    if site.kind == "other":
        return None if kind in ("text", "cross", "gated") else False  # a sound that is given
    gated = ("joint", "self", "cross", "text")
    alike = {"temporal": ("self", "cross"), "gated": gated}.get(kind, (kind,))
    if kind == "joint" and site.kind == "self":
        alike = ("self", "joint")  # the text did not change: padding, or a template
    if site.kind not in alike:
        return False
    if kind in ("text", "cross", "temporal"):
        return True
    return _within(site.image_queries, queries) and _within(site.image_keys, keys)


def _within(measured: Span, declared: Span) -> bool:
    """Whether what follows the seed lies in the image's span (given images do not follow it)."""
    if measured is None or declared is None:
        return measured is None
    return declared[0] <= measured[0] and measured[1] <= declared[1]


def _words(pipe: Any, shown: Shown, tokens: int | None) -> Fact:
    what = f"{WORD[0]!r} of {PROMPTS[0]!r}"
    measured = "no text" if shown.word is None else f"positions {shown.word}"
    try:
        found = TextLayout(pipe).read(PROMPTS[0], tokens).find(WORD[0])
    except HookctlError as error:
        return Fact(what, str(error), measured, None)
    before = text_streams(pipe)[0].start  # tokens that are not in the text of the call
    found = tuple(position - before for position in found)
    # The other word may be longer, and then moves what follows it.
    agrees = shown.word[: len(found)] == found if shown.word else None
    return Fact(what, f"positions {found}", measured, agrees)


def _text(span: Span) -> str:
    return "none" if span is None else f"{span[0]}..{span[1] - 1}"
