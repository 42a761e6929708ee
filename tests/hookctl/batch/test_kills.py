"""Exactly once: a job that is killed again and again makes what one that is not makes.

The job runs in a forked process of its own, over the embedded pipeline, and gets SIGKILL after a
random number of tasks, anywhere within one or between two.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hookctl
from hookctl.batch import Outcome, Plan, Task, Work, run_job
from hookctl.batch.files import samples
from tests.hookctl.batch.jobs import PAIRS, planned, tars, unlike_any, write_job

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="forks, which Linux alone does well"
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return hookctl.load_shapes(device="cpu")


def killed(plan: Plan, work: Work, out: Path, pipe: Any, after: int, wait: float) -> bool:
    """Run a job and kill it `wait` seconds after it began its task number `after`; False if it was
    done before."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_job, args=(plan, work, out, lambda: pipe))
    process.start()
    begun: set[str] = set()
    while process.is_alive() and len(begun) < after:
        for path in out.glob(".*.trying"):
            try:
                text = path.read_text("utf-8")
            except FileNotFoundError:  # its shard was done just now
                continue
            if text:
                begun.add(path.name + text)
        time.sleep(0.002)
    time.sleep(wait)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def check_kills(
    tmp_path: Path, pipe: Any, kills: int, pairs: list[dict[str, Any]], seeds: int, tasks: int
) -> None:
    draw, wait = random.Random(kills), 0.01 if pipe is None else 0.1
    path = write_job(tmp_path, pairs, seeds=seeds, tasks=tasks, shards="maps = false")
    plan, work = planned(path)
    out = tmp_path / "killed"
    for _ in range(kills):
        assert killed(plan, work, out, pipe, draw.randint(1, 2 * tasks - 1), draw.uniform(0, wait))
        assert not (out / "manifest.json").exists()
    manifest = run_job(plan, work, out, lambda: pipe)
    whole = run_job(plan, work, tmp_path / "whole", lambda: pipe)
    assert manifest == whole and tars(out) == tars(tmp_path / "whole")
    assert not manifest["errors"] and not [*out.glob(".*")]
    keys = [key for shard in manifest["shards"] for key, _ in samples(out / shard["file"])]
    made = manifest["records"] + manifest["duplicates"]["images"]
    assert len(set(keys)) == len(keys) == manifest["records"] and made == len(plan)


def slowly(task: Task, pipe: Any, work: Work) -> Outcome:
    """In place of `run`: a record of noise, after a while."""
    time.sleep(0.004)
    return unlike_any(task, pipe, work)


@pytest.mark.slow
def test_twenty_kills_of_a_job_that_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of its time goes into writing, so that kills fall there too."""
    monkeypatch.setattr("hookctl.batch.shard.run", slowly)
    check_kills(tmp_path, None, 20, PAIRS[:5], seeds=40, tasks=10)


@pytest.mark.long
def test_three_kills(tmp_path: Path, pipe: Any) -> None:
    check_kills(tmp_path, pipe, 3, PAIRS, seeds=4, tasks=4)


@pytest.mark.long  # 200 tasks twice, of a fifth of a second each on an idle core
def test_twenty_kills(tmp_path: Path, pipe: Any) -> None:
    check_kills(tmp_path, pipe, 20, PAIRS[:5], seeds=40, tasks=10)
