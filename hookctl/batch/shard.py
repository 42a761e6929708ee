"""One shard: its tasks run, their records written; the side-file, written last, is the commit."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hookctl.batch.files import add_sample, commit_json, committed, samples, sha256, tar_into
from hookctl.batch.plan import Shard, tasks_of
from hookctl.batch.run import Outcome, Work, run

DEATHS = 5  # of the process in one and the same task, after which it is left out

Line = dict[str, Any]  # what a side-file holds
Told = Callable[[Outcome], None]


def line_of(out: Path, name: str) -> Line | None:
    """The side-file of a shard, None if the shard isn't done."""
    try:
        found: Line = json.loads((out / f"{name}.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    return found


def is_whole(out: Path, line: Mapping[str, Any]) -> bool:
    """Whether the tar of a side-file is the one that it tells of."""
    try:
        with (out / line["file"]).open("rb") as file:
            return sha256(file) == line["sha256"]
    except FileNotFoundError:
        return False


def make_shard(shard: Shard, work: Work, out: Path, pipe: Any, told: Told | None = None) -> Line:
    """Run the tasks of a shard and write it; what its side-file says.

    told: called with what came of each task. Another process that makes the same shard writes the
    same bytes. Raises OSError where it can't be written.
    """
    started, worked = time.perf_counter(), 0.0
    rejects: Counter[str] = Counter()
    errors: list[Mapping[str, str]] = []
    records, failed = [], 0
    attempts = Attempts(out / f".{shard.name}.trying")
    file_name = f"{shard.name}.tar"
    with attempts, committed(out / file_name) as file:
        with tar_into(file) as tar:
            for task in tasks_of(work.job, work.core_id, shard):
                begun = time.perf_counter()
                if task.number in attempts.deadly:
                    error = f"its process died in it {DEATHS} times in a row"
                    outcome = Outcome(errors=({"id": task.id, "error": error},))
                else:
                    attempts.begin(task.number)
                    outcome = run(task, pipe, work)
                worked += time.perf_counter() - begun
                for record in outcome.records:
                    text = json.dumps(record.data, ensure_ascii=False, sort_keys=True)
                    add_sample(tar, record.id, {**record.files, "json": text.encode()})
                    records.append({"id": record.id, "hash": record.hash, "data": record.data})
                rejects.update(outcome.rejects)
                errors += outcome.errors
                failed += is_failure(outcome)
                if told is not None:
                    told(outcome)
        digest, size = sha256(file), file.seek(0, 2)
    line = {
        "plan": shard.plan,
        "rank": shard.rank,
        "file": file_name,
        "bytes": size,
        "sha256": digest,
        "tasks": shard.last - shard.first,
        "failed": failed,
        "rejects": dict(sorted(rejects.items())),
        "errors": errors,
        "duplicates": {},
        "records": records,
        "seconds": round(time.perf_counter() - started, 3),
        "seconds_in_tasks": round(worked, 3),
    }
    commit_json(out / f"{shard.name}.json", line)
    attempts.done()
    return line


def is_failure(outcome: Outcome) -> bool:
    """Whether nothing but errors came of a task."""
    return bool(outcome.errors) and not outcome.records and not outcome.rejects


def without(out: Path, line: Line, duplicates: Mapping[str, str]) -> Line:
    """A shard rewritten without some of its records; duplicates: the id that each one repeats.

    Doing it again, after a kill in the midst of it too, changes nothing.
    """
    with committed(out / line["file"]) as file:
        with tar_into(file) as tar:
            for key, files in samples(out / line["file"]):
                if key not in duplicates:
                    add_sample(tar, key, files)
        digest, size = sha256(file), file.seek(0, 2)
    line = {**line, "bytes": size, "sha256": digest, "duplicates": dict(duplicates)}
    commit_json((out / line["file"]).with_suffix(".json"), line)
    return line


class Attempts:
    """Which task is at work, in a file: what is still there when a process starts was deadly.

    A process can be killed in any task, and does not die in the same one DEATHS times in a row by
    chance.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deadly: list[int] = []
        self._task, self._deaths = -1, 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            left = json.loads(path.read_text("utf-8"))
            self.deadly = [int(number) for number in left["deadly"]]
            self._task, self._deaths = int(left["task"]), int(left["deaths"]) + 1
        if self._deaths >= DEATHS:
            self.deadly.append(self._task)

    def begin(self, task: int) -> None:
        deaths = self._deaths if task == self._task else 0
        said = {"task": task, "deaths": deaths, "deadly": self.deadly}
        self.path.write_text(json.dumps(said), "utf-8")

    def done(self) -> None:
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Attempts:
        return self

    def __exit__(self, *_: object) -> None:
        """An interrupt or an error that is told is no death."""
        self.done()
