"""What a job would take: from steps that are measured here, or from the shards that are done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookctl.batch.files import add_sample, tar_into
from hookctl.batch.plan import Draw, Plan, Task, tasks_of
from hookctl.batch.run import Work, calm, draw, files_of, said
from hookctl.batch.shard import line_of
from hookctl.errors import HookctlError

SHORT, LONG = 4, 8  # steps of the draws that are measured
SEEN = 200  # tasks, of which the mean number of steps is taken
WORKERS = (1, 2, 8, 32, 128)
AIM = 180.0  # seconds of a shard: what a kill loses at most
TRIED = 8  # tasks, until one can be measured


@dataclass(frozen=True)
class Cost:
    """tasks, shards: of the plan, of which `done` tasks are there; draws: of a task, at most;
    steps: of a draw, in the mean; seconds: of a step of a pair and, beside its steps, of a draw;
    task_seconds: of a task; record_bytes: of a record; records: of a task, in the mean; measured:
    how that is known."""

    tasks: int
    shards: int
    shard_tasks: int
    done: int
    draws: int
    steps: float
    step_seconds: float | None
    draw_seconds: float | None
    task_seconds: float
    record_bytes: float
    records: float
    measured: str

    @property
    def seconds(self) -> float:
        """Of one worker, for what is left."""
        return (self.tasks - self.done) * self.task_seconds

    @property
    def bytes(self) -> float:
        return self.tasks * self.records * self.record_bytes

    @property
    def shard_seconds(self) -> float:
        return self.shard_tasks * self.task_seconds

    @property
    def wanted_tasks(self) -> int:
        """Of a shard that takes AIM seconds."""
        return max(1, min(self.tasks, round(AIM / max(self.task_seconds, 1e-9))))


def known_cost(plan: Plan, out: Path) -> Cost | None:
    """The cost by the shards that are done; None if there are none."""
    names = (plan.shard(rank).name for rank in range(plan.shards))
    lines = [line for name in names if (line := line_of(out, name)) is not None]
    tasks = sum(line["tasks"] for line in lines)
    if not tasks:
        return None
    records = sum(len(line["records"]) - len(line["duplicates"]) for line in lines)
    return Cost(
        **_of_plan(plan),
        done=tasks,
        steps=0.0,
        step_seconds=None,
        draw_seconds=None,
        task_seconds=sum(line["seconds"] for line in lines) / tasks,
        record_bytes=sum(line["bytes"] for line in lines) / max(records, 1),
        records=records / tasks,
        measured=f"by the {tasks} tasks that are done",
    )


def measured_cost(plan: Plan, work: Work, pipe: Any) -> Cost:
    """The cost by a few draws of few steps, as if all were drawn and every task kept all it may.

    HookctlError if none of the first TRIED tasks can be drawn.
    """
    with calm(pipe, plan.job.threads):
        error = None
        for task in _first(plan, TRIED):
            try:
                _draw(task, pipe, work, SHORT)  # a first call takes longer
                short, _ = _draw(task, pipe, work, SHORT)
                long, size = _draw(task, pipe, work, LONG)
            except Exception as raised:
                error = raised
                continue
            break
        else:
            raise HookctlError(f"none of the first {TRIED} tasks could be drawn: {said(error)}")  # type: ignore[arg-type]
    step = max(0.0, (long - short) / (LONG - SHORT))
    beside = max(0.0, short - SHORT * step)
    steps = _steps(plan, work)
    job = plan.job
    return Cost(
        **_of_plan(plan),
        done=0,
        steps=steps,
        step_seconds=step,
        draw_seconds=beside,
        task_seconds=job.candidates * (beside + step * steps),
        record_bytes=size,
        records=float(job.keep),
        measured=f"by draws of {SHORT} and {LONG} steps here ({plan.core['device']}, "
        f"{plan.core['dtype']})",
    )


def _of_plan(plan: Plan) -> dict[str, int]:
    tasks = min(plan.job.tasks, len(plan))
    draws = plan.job.candidates
    return {"tasks": len(plan), "shards": plan.shards, "shard_tasks": tasks, "draws": draws}


def _first(plan: Plan, count: int) -> Iterator[Task]:
    for rank in range(plan.shards):
        for task in tasks_of(plan.job, plan.core_id, plan.shard(rank)):
            if count == 0:
                return
            count -= 1
            yield task


def _steps(plan: Plan, work: Work) -> float:
    """Steps of a draw, in the mean of the first SEEN tasks."""
    from hookctl.preset.drawing import STEPS

    usual = work.job.run.get("steps", STEPS)
    every = [
        one.settings.get("run", {}).get("steps", usual)
        for task in _first(plan, SEEN)
        for one in task.draws
    ]
    return sum(every) / len(every)


def _draw(task: Task, pipe: Any, work: Work, steps: int) -> tuple[float, int]:
    """Seconds of a draw of so many steps, and bytes of it in a tar."""
    import io

    one = task.draws[0]
    run: Mapping[str, Any] = {**one.settings.get("run", {}), "steps": steps}
    one = Draw(one.candidate, one.seed, {**one.settings, "run": run})
    started = time.perf_counter()
    drawn, _ = draw(task, one, pipe, work)
    files = files_of(drawn, work.job)
    seconds = time.perf_counter() - started
    held = io.BytesIO()
    with tar_into(held) as tar:
        add_sample(tar, task.id, {**files, "json": bytes(1000)})
    return seconds, len(held.getvalue())
