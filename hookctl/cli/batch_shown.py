"""What a batch shows: how far it is, what came of it, what it would take, and its first records."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hookctl.batch.cost import AIM, WORKERS, Cost, known_cost, measured_cost
from hookctl.batch.files import samples
from hookctl.batch.plan import Plan
from hookctl.batch.run import Outcome, Work
from hookctl.batch.shard import Line
from hookctl.cli.common import save_image
from hookctl.inspect import table

SHOWN = 8  # records of the preview


class Progress:
    """A bar on a terminal, else a line a shard on standard error; wanted: None for what fits.

    made, tasks, seconds: shards, tasks and time of this call.
    """

    def __init__(self, title: str, wanted: bool | None) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        shown = terminal if wanted is None else wanted
        self._lines = not terminal and wanted is not False
        self._bar = tqdm(
            desc=title, disable=not (shown and terminal), leave=False, unit="task", file=sys.stderr
        )
        self._done = self._in_shards = 0
        self.made = self.tasks = self.errors = 0
        self.task_seconds = self.shard_seconds = 0.0
        self._started = time.perf_counter()
        self._total = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def start(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self._bar.total = total
        self._bar.initial = done
        self._move(done)
        self._started = time.perf_counter()
        if done and self._lines:
            print(f"{done} of {total} tasks were done before", file=sys.stderr)

    def task(self, outcome: Outcome) -> None:
        self.errors += len(outcome.errors)
        self._move(int(self._bar.n) + 1)

    def shard(self, line: Line) -> None:
        self.made += 1
        self.tasks += line["tasks"]
        self.task_seconds += line["seconds_in_tasks"]
        self.shard_seconds += line["seconds"]
        done = self._done + self.tasks
        self._move(done)
        passed = time.perf_counter() - self._started
        if self._lines:
            left = (self._total - done) * passed / max(self.tasks, 1)
            print(
                f"{done} of {self._total} tasks, {self.tasks / passed:.2f} a second, "
                f"{len(line['errors'])} errors in this shard, {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def _move(self, n: int) -> None:
        self._bar.n = n
        if self.errors:
            self._bar.set_postfix(errors=self.errors, refresh=False)
        self._bar.refresh()


def say(manifest: Mapping[str, Any], watch: Progress, out: Path) -> None:
    """What there is now, and what this call did of it."""
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(
        f"{manifest['records']} records of {manifest['tasks']} tasks in "
        f"{len(manifest['shards'])} shards, {amount(size)}"
    )
    dropped = manifest["duplicates"]
    lines = [(count, reason) for reason, count in manifest["rejects"].items()]
    lines += [(dropped["images"], "image that was there"), (dropped["prompts"], "prompts twice")]
    lines += [(manifest["errors"], "error, see errors.jsonl")]
    for count, reason in lines:
        if count:
            print(f"  not kept: {count:6d} {reason}")
    if watch.tasks:
        beside = 1 - watch.task_seconds / max(watch.shard_seconds, 1e-9)
        print(
            f"made now: {watch.tasks} tasks in {watch.made} shards, "
            f"{watch.shard_seconds / watch.tasks:.2f} s a task ({beside:.1%} beside the tasks)"
        )
    print(f"look at {out / 'preview.png'}; the list of records is {out / 'manifest.jsonl'}")


def preview(plan: Plan, out: Path) -> None:
    """A sheet of the first records: source, edited, and the places that may differ."""
    from PIL import Image

    from hookctl.inspect import show

    rows: list[list[Any]] = []
    titles: list[str] = []
    for rank in range(plan.shards):
        for _, files in samples(out / f"{plan.shard(rank).name}.tar"):
            if len(rows) == SHOWN:
                break
            row = [
                Image.open(io.BytesIO(files[name])).convert("RGB") if name in files else None
                for name in ("source.png", "edited.png", "mask.png")
            ]
            rows.append(row)
            titles.append(_title(files["json"]))
        if len(rows) == SHOWN:
            break
    if not rows:
        return
    columns = ["source", "edited", "places"]
    if not any(row[2] for row in rows):
        rows, columns = [row[:2] for row in rows], columns[:2]
    sheet = show.grid(rows, column_titles=columns, row_titles=titles)
    save_image(sheet, out / "preview.png")


def _title(data: bytes) -> str:
    import json

    said = json.loads(data)
    return f"{said['source']}, then {said['edited']}"


def say_cost(
    plan: Plan, work: Work, out: Path, load: Callable[[], Any], price: float | None
) -> None:
    """What a job would take; from the shards that are done, else from steps that are measured."""
    cost = known_cost(plan, out) or measured_cost(plan, work, load())
    print("\n".join(cost_lines(cost, price)))


def cost_lines(cost: Cost, price: float | None) -> list[str]:
    """The cost in words; price: of a worker's hour."""
    draws = f" of up to {cost.draws} draws" if cost.draws > 1 else ""
    lines = [f"{cost.tasks:,} tasks{draws}, {cost.done:,} of them done"]
    lines.append(f"measured {cost.measured}: {duration(cost.task_seconds)} a task")
    if cost.step_seconds is not None:
        lines.append(
            f"  {cost.step_seconds:.3f} s a step of a pair, {cost.draw_seconds:.3f} s a draw "
            f"beside its steps, {cost.steps:g} steps a draw"
        )
    hours = cost.seconds / 3600
    heads, row = (
        ["workers", *map(str, WORKERS)],
        ["time", *(duration(cost.seconds / n) for n in WORKERS)],
    )
    lines += [table([row], heads), f"worker-hours: {hours:,.2f}"]
    if price is not None:
        lines[-1] += f", at {price:g} each: {hours * price:,.2f}"
    lines.append(
        f"shards: {cost.shards:,} of {cost.shard_tasks:,} tasks, "
        f"{amount(cost.shard_tasks * cost.records * cost.record_bytes)} and "
        f"{duration(cost.shard_seconds)} each, which is what a kill loses at most"
    )
    if not AIM / 5 <= cost.shard_seconds <= AIM * 5 and cost.wanted_tasks != cost.shard_tasks:
        lines.append(f"  tasks = {cost.wanted_tasks:,} in [shards] would take {duration(AIM)} each")
    each = f"{cost.records:g} records a task" if cost.records != 1 else "a record a task"
    lines.append(f"storage: {amount(cost.bytes)} ({each} of {amount(cost.record_bytes)})")
    return lines


def duration(seconds: float) -> str:
    """A time in the unit that fits."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def amount(size: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
