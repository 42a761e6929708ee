"""What the editors of a session did, step by step, and which of them did nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hookctl.address.clock import Clock
from hookctl.address.sites import Site
from hookctl.editor import Editor
from hookctl.evaluate.plan import Plan
from hookctl.inspect.tables import table

HEADERS = ("editor", "where", "what", "steps", "plan", "reason")
# What changes nothing by itself: a look at attention, and rows and texts for others to use.
LOOKING = frozenset(("read", "branches", "context"))


@dataclass(eq=False)
class Log:
    """Which editor did what, where and at which steps.

    entries: its verbs at attention sites, by plan; hooks: what its hooks round the attention did,
    "" for nothing; clocks: of the denoiser calls that were made.
    """

    entries: dict[tuple[int, str, Plan], tuple[Editor, Site, set[str], set[int]]] = field(
        default_factory=dict
    )
    hooks: dict[tuple[int, str, str, str], tuple[Editor, set[int]]] = field(default_factory=dict)
    clocks: dict[Clock, None] = field(default_factory=dict)

    def note(self, editor: Editor, site: Site, step: int, verbs: set[str], plan: Plan) -> None:
        """An editor used verbs at a site, and the call was evaluated by this plan."""
        key = (id(editor), site.path, plan)
        entry = self.entries.setdefault(key, (editor, site, set(), set()))
        entry[2].update(verbs)
        entry[3].add(step)

    def note_hook(self, editor: Editor, hook: str, step: int, what: str, where: str) -> None:
        """A hook round the attention was called; what: it did, "" for nothing."""
        key = (id(editor), hook, where, what)
        self.hooks.setdefault(key, (editor, set()))[1].add(step)

    def note_call(self, clock: Clock) -> None:
        """A denoiser call of the pipeline was made."""
        self.clocks[clock] = None

    def rows(self) -> list[tuple[str, ...]]:
        """What was done at attention sites: editor, site, verbs, steps, plan, reason."""
        return [
            (
                editor.name,
                site.label,
                ", ".join(sorted(verbs)),
                spans(steps),
                plan.name,
                plan.reason,
            )
            for (_, _, plan), (editor, site, verbs, steps) in self.entries.items()
        ]

    def hook_rows(self) -> list[tuple[str, ...]]:
        """What was done round the attention: editor, place, hook, steps, "", what it did."""
        return [
            (editor.name, where, hook, spans(steps), "", what)
            for (_, hook, where, what), (editor, steps) in self.hooks.items()
            if what
        ]

    def acted(self, editor: Editor) -> bool:
        """Whether the editor did anything; of one that is to change the run, more than to look."""
        verbs = [entry[2] for key, entry in self.entries.items() if key[0] == id(editor)]
        hooks = {key[1] for key in self.hooks if key[0] == id(editor) and key[3]}
        if editor.neutral() is False:
            verbs, hooks = [found - LOOKING for found in verbs], hooks - LOOKING
        return any(verbs) or bool(hooks)

    def silent(self, editors: Iterable[Editor]) -> Iterator[tuple[str, str]]:
        """The editors that did nothing, by name, and why."""
        for editor in editors:
            if not self.acted(editor):
                yield editor.name, self._why(editor)

    def lost(self, editors: Iterable[Editor]) -> Iterator[tuple[Editor, str]]:
        """The editors that did nothing though they were to: out of time, or not neutral."""
        for editor in editors:
            meant = editor.neutral() or editor.start == editor.stop
            if self.acted(editor) or meant:
                continue
            met = any(editor.active(clock) for clock in self.clocks)
            if not met or editor.neutral() is False:
                yield editor, self._why(editor)

    def _why(self, editor: Editor) -> str:
        if not self.clocks:
            return "the denoiser was not called"
        steps = spans({clock.step for clock in self.clocks})
        if not any(editor.active(clock) for clock in self.clocks):
            total = max(clock.steps for clock in self.clocks)
            of = f" of {total}" if total else ""
            return (
                f"its window, {editor.start:g} to {editor.stop:g} of the schedule, holds none of "
                f"the steps that ran, {steps}{of}"
            )
        return (
            f"it was active at steps {steps} and changed nothing: its strength is 0, or no row, "
            "word or site of the run is its own"
        )


def report(log: Log, editors: Sequence[Editor]) -> str:
    """A table of what every editor did, and a line for each that did nothing."""
    if not editors:
        return "no editors"
    rows = [*log.rows(), *log.hook_rows()]
    lines = [table(rows, HEADERS)] if rows else []
    silent = [f"{name} never acted: {why}" for name, why in log.silent(editors)]
    return "\n\n".join([*lines, "\n".join(silent)] if silent else lines)


def spans(steps: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'"""
    found: list[list[int]] = []
    for step in sorted(steps):
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)
