"""From a plan to a folder of shards: what is not there yet is made, by one process or by many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hookctl.batch.files import commit_json, read_json, sweep
from hookctl.batch.manifest import MANIFEST, finish
from hookctl.batch.plan import Plan, Shard
from hookctl.batch.run import Outcome, Work, calm
from hookctl.batch.shard import Line, Told, is_failure, is_whole, line_of, make_shard
from hookctl.errors import HookctlError, InputError

JOB = "job.json"
HOPELESS = 8  # tasks: if so many fail at the start and none does not, the rest would too

Load = Callable[[], Any]
Engine = Callable[[Sequence[Shard], Work, Path, Load, Told], Iterator[Line]]


class Watch(Protocol):
    """Who is told how far a job is."""

    def start(self, done: int, total: int) -> None:
        """Of `total` tasks `done` were there before."""

    def task(self, outcome: Outcome) -> None:
        """A task has ended, in this process."""

    def shard(self, line: Line) -> None:
        """A shard is committed, by whichever process."""


class Unwatched:
    def start(self, done: int, total: int) -> None: ...
    def task(self, outcome: Outcome) -> None: ...
    def shard(self, line: Line) -> None: ...


def serial(
    shards: Sequence[Shard], work: Work, out: Path, load: Load, told: Told
) -> Iterator[Line]:
    """Make shards one after the other, here."""
    pipe = load()
    with calm(pipe, work.job.threads):
        for shard in shards:
            yield make_shard(shard, work, out, pipe, told)


def run_job(
    plan: Plan,
    work: Work,
    out: Path,
    load: Load,
    *,
    engine: Engine = serial,
    watch: Watch | None = None,
    about: Mapping[str, Any] | None = None,
    verify: bool = False,
    retry: bool = False,
) -> dict[str, Any]:
    """Make what is not there of a plan; the manifest of the whole.

    load: makes the pipeline, once in each process; about: what `prepare` notes of the job;
    verify: read done shards to see whether they are whole; retry: make those with errors anew.
    Raises InputError for a folder that is another plan's, and HookctlError if every task fails.
    """
    watch = watch or Unwatched()
    prepare(plan, out, about or {})
    every = map(plan.shard, range(plan.shards))
    pending = [shard for shard in every if not _done(out, shard, verify, retry)]
    waiting = sum(shard.last - shard.first for shard in pending)
    watch.start(len(plan) - waiting, len(plan))
    if pending:
        (out / MANIFEST).unlink(missing_ok=True)
        start = _Start()

        def told(outcome: Outcome) -> None:
            start.told = True
            start.count(1, is_failure(outcome), outcome.errors)
            watch.task(outcome)

        for line in engine(pending, work, out, load, told):
            if not start.told:
                start.count(line["tasks"], line["failed"], line["errors"])
            watch.shard(line)
    return finish(plan, out)


def prepare(plan: Plan, out: Path, about: Mapping[str, Any]) -> None:
    """The folder, with what it is for; InputError if it is for something else."""
    check_folder(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if not (out / JOB).exists() or read_json(out / JOB).get("plan") != plan.id:
        commit_json(out / JOB, {"plan": plan.id, "core": dict(plan.core), **about})


def check_folder(plan: Plan, out: Path) -> None:
    """InputError for a folder that holds another plan's shards."""
    if not (out / JOB).exists() or not any(out.glob("*-of-*.json")):
        return
    there = read_json(out / JOB)
    if there.get("plan") == plan.id:
        return
    was: Mapping[str, Any] = there.get("core", {})
    differing = [key for key in plan.core if plan.core[key] != was.get(key)]
    what = ", ".join(differing) or "the pairs, seeds or shards"
    raise InputError(
        f"{out}: holds the shards of another job (they differ in: {what}); give another --out, or "
        "remove the folder"
    )


def _done(out: Path, shard: Shard, verify: bool, retry: bool) -> bool:
    line = line_of(out, shard.name)
    if (
        line is None
        or (retry and (line["errors"] or line["duplicates"]))
        or (verify and not is_whole(out, line))
    ):
        (out / f"{shard.name}.json").unlink(missing_ok=True)
        return False
    return True


class _Start:
    """Ends a job whose first tasks fail one and all.

    told: whether tasks are counted one by one, in this process.
    """

    def __init__(self) -> None:
        self.told = False
        self._tasks = self._failed = 0

    def count(self, tasks: int, failed: int, errors: Sequence[Mapping[str, str]]) -> None:
        if self._failed < self._tasks:
            return  # one went well
        self._tasks += tasks
        self._failed += failed
        if self._failed == self._tasks >= HOPELESS:
            raise HookctlError(
                f"the first {self._tasks} tasks failed, all of them; the last with: "
                f"{errors[-1]['error']}"
            )
