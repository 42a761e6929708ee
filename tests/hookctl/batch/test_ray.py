"""Ray makes the same shards as one process, also when a worker is killed."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import hookctl
from hookctl.batch import make_shard, ray_engine, run_job
from hookctl.batch.ray_engine import RayEngine
from hookctl.errors import InputError
from tests.hookctl.batch.jobs import PAIRS, planned, tars, unlike_any, write_job


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"extra \[ray\]; pip install 'hookctl\[ray\]', or"):
        ray_engine.check_ray()


def test_a_worker_makes_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray calls, called here: nothing but text and numbers comes back."""
    monkeypatch.setattr("hookctl.batch.shard.run", unlike_any)
    plan, work = planned(write_job(tmp_path, PAIRS, tasks=2))
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    worker = ray_engine.Worker(work, tmp_path / "there", lambda: None)
    for rank in range(plan.shards):
        made = worker({"shard": pickle.dumps(plan.shard(rank))})
        line = pickle.loads(made["line"])
        assert (line["rank"], line["tasks"], line["records"]) == (rank, 2, 2)
        make_shard(plan.shard(rank), work, tmp_path / "here", None)
        name = f"{plan.shard(rank).name}.tar"
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@dataclass(frozen=True)
class Load:
    """Loads the embedded pipeline, and notes which process did."""

    pids: Path

    def __call__(self) -> Any:
        pipe = hookctl.load_shapes(device="cpu")
        (self.pids / str(os.getpid())).touch()
        return pipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ray writes a token to the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "300000")  # on a busy machine
    yield tmp_path


@pytest.mark.long  # Ray starts nine processes, and each worker loads the model
@pytest.mark.skipif(
    find_spec("ray") is None or find_spec("pyarrow") is None,
    reason="ray is not installed; pip install 'hookctl[ray]'",
)
def test_a_worker_is_killed(home: Path) -> None:
    plan, work = planned(write_job(home, PAIRS, seeds=2, tasks=2))
    pids, out = home / "pids", home / "ray"
    pids.mkdir()
    killed: list[int] = []

    def kill() -> None:
        """The worker that has begun its second shard."""
        while len([*out.glob("*.tar")]) < 1 or not [*out.glob(".*.trying")]:
            time.sleep(0.01)
        killed.append(int(next(pids.iterdir()).name))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    made = run_job(plan, work, out, Load(pids), engine=RayEngine(workers=1))
    thread.join(timeout=1)
    here = run_job(plan, work, home / "here", lambda: hookctl.load_shapes(device="cpu"))
    assert killed and len([*pids.iterdir()]) == 2  # a second worker took over
    assert made == here and tars(out) == tars(home / "here")
