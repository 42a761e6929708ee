"""Shards and their commits, with tasks that draw nothing: what is there is whole, and made once."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hookctl.batch import Outcome, Task, Unwatched, Work, make_shard, run_job, tasks_of
from hookctl.batch.files import committed, samples, sweep
from hookctl.batch.filters.perceptual import pair_hash
from hookctl.batch.shard import DEATHS, Attempts, Line, line_of
from hookctl.errors import HookctlError, InputError
from tests.hookctl.batch.jobs import PAIRS, planned, tars, unlike_any, write_job

Run = Callable[[Task, Any, Work], Outcome]


class Counted:
    """A run that counts how often each task was run."""

    def __init__(self, run: Run = unlike_any) -> None:
        self.run = run
        self.tasks: list[int] = []

    def __call__(self, task: Task, pipe: Any, work: Work) -> Outcome:
        self.tasks.append(task.number)
        return self.run(task, pipe, work)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    made = Counted()
    monkeypatch.setattr("hookctl.batch.shard.run", made)
    return made


def everything(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    plan, work = planned(path)
    return run_job(plan, work, out, lambda: None, **options)


def test_a_job_from_end_to_end(tmp_path: Path, counted: Counted) -> None:
    manifest = everything(write_job(tmp_path, seeds=2, tasks=5), tmp_path / "out")
    assert counted.tasks == list(range(12))
    assert [shard["records"] for shard in manifest["shards"]] == [5, 5, 2]
    assert manifest["records"] == manifest["tasks"] == 12 and not manifest["errors"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").open()]
    assert rows[0]["source"] == PAIRS[0]["source"] and rows[0]["object"] == "circle"
    found = [
        key for one in manifest["shards"] for key, _ in samples(tmp_path / "out" / one["file"])
    ]
    assert found == [row["id"] for row in rows] and len(set(found)) == 12


def test_bytes_say_only_what_is_in_them(tmp_path: Path, counted: Counted) -> None:
    path = write_job(tmp_path, tasks=4)
    first, second = everything(path, tmp_path / "a"), everything(path, tmp_path / "b")
    assert first == second and tars(tmp_path / "a") == tars(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / first["shards"][0]["file"]) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")


def test_what_is_done_is_not_done_again(tmp_path: Path, counted: Counted) -> None:
    path, out = write_job(tmp_path, tasks=2), tmp_path / "out"
    everything(path, out)
    whole = tars(out)
    counted.tasks.clear()
    everything(path, out)
    assert counted.tasks == [] and tars(out) == whole
    plan, _ = planned(path)
    (out / f"{plan.shard(1).name}.json").unlink()  # killed before its commit
    everything(path, out)
    assert counted.tasks == [2, 3] and tars(out) == whole


def test_a_shard_that_is_not_whole_is_seen(tmp_path: Path, counted: Counted) -> None:
    path, out = write_job(tmp_path, tasks=2), tmp_path / "out"
    everything(path, out)
    whole = tars(out)
    plan, _ = planned(path)
    (out / f"{plan.shard(2).name}.tar").write_bytes(b"cut")
    counted.tasks.clear()
    everything(path, out, verify=True)
    assert counted.tasks == [4, 5] and tars(out) == whole


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), committed(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("a", b"old")]


def test_parts_of_the_dead_are_swept(tmp_path: Path) -> None:
    with committed(tmp_path / "a") as file:
        mine = Path(file.name)
        sweep(tmp_path)
        assert mine.exists()  # its process lives
        dead = mine.with_name(mine.name.replace(f"-{os.getpid()}", "-999999999"))
        dead.write_bytes(b"")
        old = mine.with_name(".a.part-elsewhere-1")
        young = mine.with_name(".a.part-elsewhere-2")
        for one in (old, young):
            one.write_bytes(b"")
        os.utime(old, (0, 0))
        sweep(tmp_path)
        assert not dead.exists() and not old.exists() and young.exists()


def test_another_jobs_folder_is_refused(tmp_path: Path, counted: Counted) -> None:
    out = tmp_path / "out"
    everything(write_job(tmp_path, tasks=2), out)
    with pytest.raises(InputError, match=r"another job \(they differ in: the pairs, seeds or sh"):
        everything(write_job(tmp_path, tasks=3), out)
    with pytest.raises(InputError, match=r"they differ in: candidates\)"):
        everything(write_job(tmp_path, tasks=2, count=2), out)


def test_a_folder_without_shards_is_anyones(tmp_path: Path, counted: Counted) -> None:
    def unloadable() -> Any:
        raise InputError("no model")

    out = tmp_path / "out"
    plan, work = planned(write_job(tmp_path, tasks=2))
    with pytest.raises(InputError, match="no model"):
        run_job(plan, work, out, unloadable)
    assert everything(write_job(tmp_path, tasks=3), out)["records"] == 6
    assert json.loads((out / "job.json").read_text())["plan"] != plan.id


def poisoned(task: Task, pipe: Any, work: Work) -> Outcome:
    """In place of `run`: every third task fails, every second that does not is rejected."""
    if task.number % 3 == 1:
        return Outcome(errors=({"id": task.id, "error": "poison"},))
    if task.number % 2:
        return Outcome(rejects={"background < 25": 1})
    return unlike_any(task, pipe, work)


def test_errors_and_rejects_are_counted(tmp_path: Path, counted: Counted) -> None:
    counted.run = poisoned
    path, out = write_job(tmp_path, seeds=2, tasks=5), tmp_path / "out"
    manifest = everything(path, out)
    assert (manifest["records"], manifest["errors"], manifest["failed"]) == (4, 4, 4)
    assert manifest["rejects"] == {"background < 25": 4}
    errors = [json.loads(line) for line in (out / "errors.jsonl").open()]
    assert [error["error"] for error in errors] == ["poison"] * 4
    counted.run = unlike_any
    manifest = everything(path, out, retry=True)
    assert manifest["records"] == 12 and not (out / "errors.jsonl").exists()


def test_a_job_that_fails_one_and_all_ends(tmp_path: Path, counted: Counted) -> None:
    counted.run = lambda task, pipe, work: Outcome(errors=({"id": task.id, "error": "no site"},))
    path, out = write_job(tmp_path, seeds=3, tasks=20), tmp_path / "out"
    with pytest.raises(HookctlError, match="the first 8 tasks failed, all of them.*: no site"):
        everything(path, out)
    assert not [*out.glob("*.tar")] and not (out / "manifest.json").exists()
    counted.run = poisoned
    assert everything(path, out)["errors"] == 6


def test_so_it_does_with_workers_elsewhere(tmp_path: Path, counted: Counted) -> None:
    """Which tell by shards."""
    lines: list[Line] = [
        {"tasks": 4, "failed": 4, "errors": [{"id": "a", "error": "no site"}]} for _ in range(3)
    ]
    with pytest.raises(HookctlError, match="the first 8 tasks failed"):
        everything(write_job(tmp_path, tasks=2), tmp_path / "out", engine=lambda *_: iter(lines))


def alike(task: Task, pipe: Any, work: Work) -> Outcome:
    """In place of `run`: four tasks in a row are the same image."""
    outcome = unlike_any(task, pipe, work)
    image = Image.linear_gradient("L").rotate(10 * (task.number // 4)).convert("RGB")
    return replace(outcome, records=(replace(outcome.records[0], hash=pair_hash(image, image)),))


def test_images_that_were_there_are_dropped(tmp_path: Path, counted: Counted) -> None:
    """Across shards, and the same whether the job was broken off in between or not."""
    counted.run = alike
    path, out = write_job(tmp_path, seeds=2, tasks=3), tmp_path / "out"
    manifest = everything(path, out)
    assert manifest["records"] == 3 and manifest["duplicates"] == {"prompts": 0, "images": 9}
    kept = [key for one in manifest["shards"] for key, _ in samples(out / one["file"])]
    rows = [json.loads(line)["id"] for line in (out / "manifest.jsonl").open()]
    assert kept == rows and len(kept) == 3
    whole = tars(out)
    plan, _ = planned(path)
    # As a kill between a rewritten tar and its side-file leaves it.
    name = plan.shard(1).name
    line = line_of(out, name)
    assert line is not None and line["duplicates"]
    (out / f"{name}.json").write_text(json.dumps(line | {"duplicates": {}, "sha256": "old"}))
    (out / "manifest.json").unlink()
    assert everything(path, out) == manifest and tars(out) == whole
    kept_all = everything(write_job(tmp_path, seeds=2, tasks=3, shards="near = false"), out / "b")
    assert kept_all["records"] == 12 and kept_all["duplicates"]["images"] == 0


def test_what_kills_its_process_is_left_out(tmp_path: Path, counted: Counted) -> None:
    """After DEATHS in a row, and never for deaths elsewhere in between."""
    path = tmp_path / ".a.trying"
    for death in range(DEATHS):
        attempts = Attempts(path)
        assert attempts.deadly == [], death
        for task in (0, 1, 2):  # and there it dies
            attempts.begin(task)
    assert Attempts(path).deadly == [2]
    attempts = Attempts(path)
    attempts.begin(3)
    assert Attempts(path).deadly == [2]  # it is remembered
    attempts.begin(1)
    for _ in range(DEATHS - 1):
        attempts = Attempts(path)
        attempts.begin(1)
        assert attempts.deadly == [2]
    job = write_job(tmp_path, tasks=6)
    plan, work = planned(job)
    shard = plan.shard(0)
    (tmp_path / f".{shard.name}.trying").write_text('{"task": 1, "deaths": 4, "deadly": []}')
    line = make_shard(shard, work, tmp_path, None)
    assert counted.tasks == [0, 2, 3, 4, 5] and len(line["records"]) == 5
    assert line["errors"] == [
        {
            "id": tasks_of(plan.job, plan.core_id, shard)[1].id,
            "error": "its process died in it 5 times in a row",
        }
    ]
    assert not (tmp_path / f".{shard.name}.trying").exists()


def test_an_interrupt_is_no_death(tmp_path: Path, counted: Counted) -> None:
    def interrupted(task: Task, pipe: Any, work: Work) -> Outcome:
        raise KeyboardInterrupt

    counted.run = interrupted
    plan, work = planned(write_job(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        make_shard(plan.shard(0), work, tmp_path, None)
    assert not [*tmp_path.glob(".*")] and not [*tmp_path.glob("*.tar")]


def test_a_watch_is_told(tmp_path: Path, counted: Counted) -> None:
    class Watch(Unwatched):
        said: list[object] = []

        def start(self, done: int, total: int) -> None:
            self.said.append((done, total))

        def task(self, outcome: Outcome) -> None:
            self.said.append("task")

        def shard(self, line: Line) -> None:
            self.said.append(line["rank"])

    path, out = write_job(tmp_path, tasks=4), tmp_path / "out"
    everything(path, out, watch=Watch())
    assert Watch.said == [(0, 6), *["task"] * 4, 0, *["task"] * 2, 1]
    Watch.said.clear()
    everything(path, out, watch=Watch())
    assert Watch.said == [(6, 6)]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, counted: Counted) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        everything(write_job(tmp_path), tmp_path / "file" / "out")
