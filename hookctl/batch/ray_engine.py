"""Shards made by Ray: actors that load the model once, on as many machines as Ray has.

Ray starts workers anew that die, and gives their shards out again; which shards there are, and
when one is done, is said by the files alone. All machines must see the folder and the model.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hookctl.batch.engine import Load
from hookctl.batch.plan import Shard
from hookctl.batch.run import Work, calm
from hookctl.batch.shard import Line, Told, make_shard
from hookctl.errors import InputError

_STORE = 200 * 2**20  # bytes: workers hand over no images


@dataclass(frozen=True)
class RayEngine:
    """An engine for `run_job`.

    workers: how many, each with a pipeline of its own; gpus: of each, fractions are possible; cpus:
    of each. Where Ray runs already it is used: `ray.init` before, or RAY_ADDRESS.
    """

    workers: int = 1
    gpus: float = 0.0
    cpus: float = 1.0

    def __call__(
        self, shards: Sequence[Shard], work: Work, out: Path, load: Load, told: Told
    ) -> Iterator[Line]:
        check_ray()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        started = not ray.is_initialized()
        if started:
            threads = {"OMP_NUM_THREADS": str(work.job.threads)}
            path = os.environ.get("PYTHONPATH")
            given = threads | ({"PYTHONPATH": path} if path else {})
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": given},
                **({} if "RAY_ADDRESS" in os.environ else self._here()),
            )
        try:
            yield from self._made(shards, work, out.resolve(), load)
        finally:
            if started:
                ray.shutdown()

    def _here(self) -> dict[str, Any]:
        cores = os.cpu_count() or 1
        # Ray's own tasks need a core beside those of the workers, or all wait for ever.
        needed = int(self.workers * self.cpus + 1.5)
        return {"num_cpus": max(cores, needed), "object_store_memory": _STORE}

    def _made(self, shards: Sequence[Shard], work: Work, out: Path, load: Load) -> Iterator[Line]:
        import ray.data
        from ray.data import ActorPoolStrategy, DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = False
        workers = min(self.workers, len(shards))
        rows = [{"shard": pickle.dumps(shard)} for shard in shards]
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_args=(work, out, load),
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
        )
        for row in made.iter_rows():
            yield pickle.loads(row["line"])


class Worker:
    """An actor: a pipeline, and what makes shards by it."""

    def __init__(self, work: Work, out: Path, load: Load) -> None:
        self.work, self.out, self.pipe = work, out, load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with calm(self.pipe, self.work.job.threads):
            line = make_shard(pickle.loads(row["shard"]), self.work, self.out, self.pipe)
        # What was made stays in the side-file.
        return {"line": pickle.dumps({**line, "records": len(line["records"])})}


def check_ray() -> None:
    """InputError where Ray is missing."""
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise InputError(
            "--engine ray needs the packages of the extra [ray]; pip install 'hookctl[ray]', or "
            "use --engine serial"
        )
