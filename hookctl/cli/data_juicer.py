"""A data-juicer operator: the prompts of a sample drawn as a pair, as `hookctl batch` draws them.

`job` is a job file; a sample is a row of its pairs, and gets the paths of its images under
`image_key`, source and edited in turn, and for each seed what was and was not kept under `pairs`.
"""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from data_juicer.ops.base_op import OPERATORS, Mapper

from hookctl.batch import Pair, digest, run
from hookctl.batch.plan import seeds_of, task_of
from hookctl.batch.run import calm
from hookctl.cli.batch_job import checked_job, prepared, working
from hookctl.cli.common import usable_device
from hookctl.errors import InputError


@OPERATORS.register_module("hookctl_pair_mapper")
class PairMapper(Mapper):  # type: ignore[misc]
    """job, model, device, dtype: as `hookctl batch` has them; output_dir: where images go."""

    def __init__(self, job, output_dir, model=None, device=None, dtype=None, **others):  # type: ignore[no-untyped-def]
        super().__init__(**others)
        self.job, self.folder = checked_job(job, model), Path(output_dir)
        self.device, self.dtype = device, dtype

    @cached_property
    def opened(self) -> tuple[Any, Any]:  # of the process that draws
        preset, load, core = prepared(self.job, usable_device(self.device), self.dtype)
        return working(self.job, preset, digest(core)), load()

    def process_single(self, sample: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
        job, rest = self.job, {k: v for k, v in sample.items() if k != self.image_key}
        if missing := {job.source, job.edited, *job.columns} - set(rest):
            raise InputError(f"{job.path}: a sample has no {', '.join(sorted(missing))}")
        pair = Pair(rest.pop(job.source), rest.pop(job.edited), rest)
        self.folder.mkdir(parents=True, exist_ok=True)
        (work, pipe), images, pairs = self.opened, [], []
        with calm(pipe, job.threads):
            for place in range(seeds_of(job)):
                outcome = run(task_of(job, work.core_id, pair, place), pipe, work)
                for record in outcome.records:
                    for name, held in record.files.items():
                        (self.folder / f"{record.id}.{name}").write_bytes(held)
                    start = str(self.folder / record.id)
                    images += [f"{start}.source.png", f"{start}.edited.png"]
                made = [record.data for record in outcome.records]
                pairs.append(json.dumps({**asdict(outcome), "records": made}))
        return sample | {self.image_key: images, "pairs": pairs}
